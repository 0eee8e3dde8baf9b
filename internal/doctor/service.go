package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Socket is one of the daemon's.
type Socket struct {
	Path   string
	Err    error // of lstat
	Mode   fs.FileMode
	Refuse error // of connect, nil when a process answers
}

func sockets(f *Facts) (found []Finding) {
	for _, s := range f.Sockets {
		switch {
		case len(found) > 0 && (s.Err != nil || s.Refuse != nil):
			// The daemon that is missing is missing once.
		case s.Err != nil:
			found = append(found, fail(fmt.Sprintf("there is no socket %s: the daemon does not run, or has another address", s.Path), "")...)
		case s.Mode&fs.ModeSocket == 0:
			found = append(found, fail(s.Path+" is not a socket, and the daemon does not start", "remove the file, or set another address")...)
		case s.Refuse != nil:
			found = append(found, fail(fmt.Sprintf("no process answers at %s: %v", s.Path, s.Refuse), "")...)
		case s.Mode.Perm()&0o077 != 0:
			found = append(found, fail(fmt.Sprintf("%s has the mode %04o: others than root can make and remove snapshots", s.Path, s.Mode.Perm()), "chmod 0600 "+s.Path)...)
		}
	}
	switch {
	case f.Live == "" && len(found) == 0 && f.ReportErr != nil:
		found = append(found, fail(fmt.Sprintf("the daemon does not report: %v", f.ReportErr), "")...)
	case f.Live != "" && f.Live != f.Root:
		found = append(found, fail(fmt.Sprintf("the daemon at %s has the root %s, and not %s", f.Sockets[0].Path, f.Live, f.Root), "make root and address of the configuration those of one daemon, and restart it")...)
	case f.Live == "" && f.ReportErr != nil && !errors.Is(f.ReportErr, fs.ErrNotExist):
		found = append(found, warn(fmt.Sprintf("the records of the stopped daemon cannot be read: %v", f.ReportErr), "")...)
	}
	return orOK(found, "both sockets answer, and only root can connect")
}

// Unit is what systemd has on record of the daemon's unit.
type Unit struct {
	Err                          error // why it is not known
	Loaded                       bool
	File                         string   // enabled, disabled, static, ...
	Socket                       string   // the same of the socket unit, "" when there is none
	Before, WantedBy, RequiredBy []string // units
	Containerd                   []string // units of this node that run a containerd
}

// containerdUnits run a containerd, as themselves or as a child.
var containerdUnits = []string{
	"containerd.service", "k3s.service", "k3s-agent.service", "rke2-server.service", "rke2-agent.service",
	"k0scontroller.service", "k0sworker.service", "snap.microk8s.daemon-containerd.service", "docker.service",
}

func unit(f *Facts) (found []Finding) {
	u := f.Unit
	switch {
	case u.Err != nil:
		return unknown(u.Err.Error())
	case !u.Loaded:
		return warn("systemd has no unit durable-snapshotter.service: the daemon does not start at boot", "install the package, or its unit, and systemctl enable --now durable-snapshotter")
	}
	if u.File != "enabled" && u.File != "enabled-runtime" && u.Socket != "enabled" {
		found = append(found, fail("durable-snapshotter.service is "+u.File+": it does not start at boot", "systemctl enable durable-snapshotter")...)
	} else if !slices.Contains(u.WantedBy, "multi-user.target") && u.Socket != "enabled" {
		found = append(found, warn(fmt.Sprintf("durable-snapshotter.service is started only with %s", strings.Join(u.WantedBy, ", ")), "use WantedBy=multi-user.target, and enable it again")...)
	}
	for _, c := range u.Containerd {
		if !slices.Contains(u.Before, c) {
			found = append(found, warn("durable-snapshotter.service is not ordered before "+c+": the CRI plugin does not load the images when it starts first", "systemctl edit durable-snapshotter: [Unit] Before="+c)...)
		}
		if slices.Contains(u.RequiredBy, c) {
			found = append(found, warn(c+" requires durable-snapshotter.service, and stops with it", "remove it from RequiredBy=")...)
		}
	}
	return orOK(found, "the unit is enabled, and starts before containerd")
}

func shutdown(f *Facts) (found []Finding) {
	if f.ReportErr != nil {
		return unknown("there is no report of the daemon")
	}
	r := f.Report
	if r.Brake != "" {
		found = append(found, fail("mending is stopped: "+r.Brake, "find the cause; then durable-snapshotter repair --apply")...)
	}
	counts, bad := map[storage.State]int{}, ""
	for _, l := range r.Layers {
		counts[l.State]++
		if l.State == storage.StateDamaged && bad == "" {
			bad = l.ChainID
		}
	}
	if n := counts[storage.StateDamaged] + counts[storage.StateHealing]; n > 0 {
		found = append(found, fail(fmt.Sprintf("%d of %d layers are damaged, such as %s", n, len(r.Layers), bad), "")...)
	}
	if n := counts[storage.StateUnverified]; n > 0 {
		found = append(found, warn(fmt.Sprintf("%d of %d layers are not verified", n, len(r.Layers)), "durable-snapshotter check verifies them, and has the reason")...)
	}
	run := r.Journal.Run
	if f.Live != "" && f.RepairImages && run.ImagesEpoch != run.Epoch {
		found = append(found, warn("the check of the images after an unclean shutdown is not finished", "wait, or see the log of the daemon: it needs containerd")...)
	}
	if f.Live == "" && run.RunID != "" && run.Stopped.IsZero() && run.BootID != f.Host.Boot {
		found = append(found, warn("the machine went down under the daemon: layers are verified at its next start", "start the daemon")...)
	}
	scrub := "no periodic verification has ended yet"
	if t := r.Journal.Scrub.Finished; !t.IsZero() {
		scrub = fmt.Sprintf("the last verification of all ended %v ago", f.Now.Sub(t).Round(time.Minute))
	}
	// The first start begins epoch 1.
	return orOK(found, fmt.Sprintf("all %d layers are ready; unclean shutdowns so far: %d; %s", len(r.Layers), max(run.Epoch, 1)-1, scrub))
}

package doctor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/defects"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestHealthy: nothing is found on a node without a failure, everything can be determined, and
// nothing on it is changed. A container that runs makes no difference.
func TestHealthy(t *testing.T) {
	t.Parallel()
	n := newNode(t, options{})
	pod := must[*kit.Pod](t)(n.CRI.StartPod(t.Context()))
	defer func() { check(t, pod.Remove(t.Context())) }()
	before := must[kit.Report](t)(n.Daemon.Inspect(t.Context()))
	all := n.doctor(t)
	all.silent(t)
	if len(all) != 24 {
		t.Errorf("%d findings: %+v", len(all), all)
	}
	for _, f := range all {
		if strings.HasPrefix(f.Text, "not known") && f.Check != "unit" && f.Check != "disk" {
			t.Errorf("%+v", f)
		}
	}
	for name, text := range map[string]string{
		"plugin": "durable", "cri-snapshotter": "pods are on durable", "unpack-config": "durable, overlayfs", "pinned-images": "1 pinned image ready",
		"sockets": "both sockets answer", "containerd-config": n.config(), "shutdown": "all 3 layers are ready",
	} {
		if f := all.of(t, name); !strings.Contains(f.Text, text) {
			t.Errorf("%+v, want %q", f, text)
		}
	}
	after := must[kit.Report](t)(n.Daemon.Inspect(t.Context()))
	if b, a := fmt.Sprint(before), fmt.Sprint(after); a != b {
		t.Errorf("the daemon has other records:\n%s\nbefore:\n%s", a, b)
	}

	stdout, _, _ := kittest.Verb(t, n.Daemon, "doctor")
	if lines := strings.Split(strings.TrimSpace(stdout), "\n"); len(lines) < 24 || !strings.Contains(stdout, "ok       cri-snapshotter    pods are on durable\n") {
		t.Errorf("for people it prints:\n%s", stdout)
	}
}

// TestFiles: what the files of containerd will make of the next start is told from what the running
// one does. The file is changed under it, and changed back.
func TestFiles(t *testing.T) {
	t.Parallel()
	n := newNode(t, options{})
	original := must[[]byte](t)(os.ReadFile(n.config()))
	const images = "[plugins.'io.containerd.cri.v1.images']\n"
	const durable = "  snapshotter = \"durable\"\n"
	for _, c := range []struct {
		name, old, with          string
		check, level, text, cure string
		follow                   []string
	}{
		{"a table twice", images, images + "[plugins.'io.containerd.cri.v1.images']\n", "containerd-config", "failure", "will not start again", "before containerd is restarted", nil},
		{"no TOML", images, "[[[\n", "containerd-config", "failure", "will not start again", "before containerd is restarted", nil},
		{"another snapshotter", durable + "  \n", "  snapshotter = \"overlayfs\"\n", "cri-snapshotter", "failure", "after a restart of containerd on overlayfs: no file sets another", "--print-config", nil},
		{"in the runtime's table", durable + "  \n", "", "cri-snapshotter", "failure", "a table that has no such key", "io.containerd.cri.v1.images", nil},
		{"us no more", "[proxy_plugins.durable]", "[proxy_plugins.other]", "unpack-config", "failure", `"durable", which is not registered`, "", nil},
		{"misspelled", "snapshotter = \"durable\"\n  differ", "snapshotter = \"durabel\"\n  differ", "unpack-config", "failure", `"durabel", which is not registered`, "correct", nil},
		{"another differ", `differ = "walking"`, `differ = "runs"`, "unpack-config", "failure", `"runs", which is not registered`, "walking", nil},
		{"blobs are discarded", images, images + "  discard_unpacked_layers = true\n", "discarded-blobs", "warning", "discard_unpacked_layers", "false", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			n.rewrite(t, c.old, c.with)
			defer func() { check(t, os.WriteFile(n.config(), original, 0o644)) }()
			switch c.name {
			case "in the runtime's table":
				n.rewrite(t, "[plugins.'io.containerd.cri.v1.runtime']\n", "[plugins.'io.containerd.cri.v1.runtime']\n  snapshotter = 'durable'\n")
			case "us no more":
				n.rewrite(t, "[proxy_plugins.durable.exports]", "[proxy_plugins.other.exports]")
				n.doctor(t).want(t, "cri-snapshotter", "failure", "after a restart", "", "unpack-config")
				return
			}
			n.doctor(t).want(t, c.check, c.level, c.text, c.cure, append(c.follow, c.check)...)
		})
	}
	n.rewrite(t, images, images+"  image_pull_with_sync_fs = true\n")
	all := n.doctor(t)
	all.silent(t)
	if f := all.of(t, "sync-knobs"); !strings.Contains(f.Text, "image_pull_with_sync_fs: harmless") {
		t.Errorf("%+v", f)
	}
	check(t, os.WriteFile(n.config(), original, 0o644))
	n.doctor(t).silent(t)
}

// TestWithoutUs: containerd runs without the snapshotter, and its files have it or not.
func TestWithoutUs(t *testing.T) {
	t.Parallel()
	n := newNode(t, options{snapshotter: "overlayfs"})
	n.doctor(t).want(t, "cri-snapshotter", "failure", "pods are on overlayfs: no file sets another", "--print-config", "pinned-images", "images")
	with := must[[]byte](t)(os.ReadFile(n.config()))
	check(t, n.Containerd.Stop())
	n.doctor(t).want(t, "plugin", "failure", "containerd does not answer", "start containerd")
	check(t, n.Containerd.Use(nil))
	check(t, n.StartContainerd(t.Context()))
	n.doctor(t).want(t, "plugin", "failure", "and its files have none either", "--print-config", "cri-snapshotter")
	check(t, os.WriteFile(n.config(), with, 0o644))
	n.doctor(t).want(t, "plugin", "failure", "and the running containerd does not", "restart containerd", "cri-snapshotter")
	n.rewrite(t, "snapshotter = \"overlayfs\"\n  \n", "snapshotter = \"durable\"\n")
	n.doctor(t).want(t, "cri-snapshotter", "failure", "pods are on overlayfs: the files of containerd have this snapshotter, and it was not restarted since", "restart containerd", "plugin")
}

// TestCauses: the CRI plugin is on overlayfs, and the files have each of the causes that
// docs/containerd.md warns of.
func TestCauses(t *testing.T) {
	t.Parallel()
	n := newNode(t, options{snapshotter: "overlayfs"})
	const criV2 = "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  snapshotter = \"durable\"\n"
	proxy := fmt.Sprintf("[proxy_plugins.durable]\n  type = \"snapshot\"\n  address = %q\n", n.Daemon.Address)
	for _, c := range []struct{ name, main, dropIn, text, cure string }{
		{"version 2 without runtimes", "version = 2\n" + proxy + criV2, "", "no table containerd.runtimes", "runtimes.runc"},
		{"a drop-in that is not imported", "version = 3\n" + proxy, "version = 3\n[plugins.'io.containerd.cri.v1.images']\n  snapshotter = \"durable\"\n", "is not imported by", "imports = ["},
		{"a drop-in of version 2", "version = 3\nimports = ['DIR/conf.d/*.toml']\n" + proxy, "version = 2\n" + criV2, "is of version 2, and", "version of the main file"},
		{"the runtime's table", "version = 3\n" + proxy + "[plugins.'io.containerd.cri.v1.runtime'.containerd]\n  snapshotter = \"durable\"\n", "", "a table that has no such key", "io.containerd.cri.v1.images"},
		{"a table of version 2", "version = 3\n" + proxy + criV2, "", "a table of version 2", "io.containerd.cri.v1.images"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := scratch(t)
			main := filepath.Join(dir, "config.toml")
			check(t, os.WriteFile(main, []byte(strings.ReplaceAll(c.main, "DIR", dir)), 0o644))
			if c.dropIn != "" {
				check(t, errors.Join(os.Mkdir(filepath.Join(dir, "conf.d"), 0o755), os.WriteFile(filepath.Join(dir, "conf.d", "d.toml"), []byte(c.dropIn), 0o644)))
			}
			n.doctor(t, "--containerd-config", main).want(t, "cri-snapshotter", "failure", c.text, c.cure, "pinned-images", "images", "unpack-config")
		})
	}
}

// TestDaemon: the daemon is down, its socket has another mode, is a file, or is that of another
// daemon; content_root is another directory.
func TestDaemon(t *testing.T) {
	t.Parallel()
	n := newNode(t, options{daemon: "content_root = '/var/lib/another'"})
	n.doctor(t).want(t, "content-root", "failure", n.ContentRoot(), n.ContentRoot())
	check(t, os.Chmod(n.Daemon.Address, 0o666))
	n.doctor(t).want(t, "sockets", "failure", "has the mode 0666", "chmod 0600", "content-root")
	check(t, os.Chmod(n.Daemon.Address, 0o600))
	stdout, _, status := kittest.Verb(t, n.Daemon, "doctor", "--root", filepath.Join(n.dir, "elsewhere"))
	if status != 2 || !strings.Contains(stdout, "has the root "+n.Daemon.Root) {
		t.Errorf("another root: status %d: %s", status, stdout)
	}
	check(t, n.Daemon.Kill())
	n.doctor(t).want(t, "sockets", "failure", "no process answers at "+n.Daemon.Address, "systemctl start", "content-root", "images", "pinned-images", "sockets")
	check(t, os.Remove(n.Daemon.Address))
	check(t, os.WriteFile(n.Daemon.Address, nil, 0o600))
	n.doctor(t).want(t, "sockets", "failure", "is not a socket", "remove the file", "content-root", "sockets")
	check(t, os.Remove(n.Daemon.Address))
	n.doctor(t).want(t, "sockets", "failure", "there is no socket", "systemctl start", "content-root", "sockets")
	check(t, n.Daemon.Configure("log_level = 'loud'\n"))
	if _, stderr, status := kittest.Verb(t, n.Daemon, "doctor"); status != 2 || !strings.Contains(stderr, "log_level") {
		t.Errorf("a configuration that cannot be used: status %d: %s", status, stderr)
	}
}

// TestImages: the blob of the pause image is gone, another image is only in overlayfs, and a container
// stands there.
func TestImages(t *testing.T) {
	t.Parallel()
	n := newNode(t, options{})
	other := must[kit.Pushed](t)(n.Push(t.Context(), "other", n.image("other")))
	must[string](t)(n.Ctr(t.Context(), "image", "pull", "--plain-http", "--snapshotter", "overlayfs", other.Ref))
	n.doctor(t).want(t, "images", "warning", "1 image, ", "durable-snapshotter migrate")
	must[string](t)(n.Ctr(t.Context(), "run", "--detach", "--snapshotter", "overlayfs", other.Ref, "old", "/bin/guest", "wait"))
	defer func() {
		_, killed := n.Ctr(t.Context(), "task", "rm", "--force", "old")
		_, removed := n.Ctr(t.Context(), "container", "rm", "old")
		check(t, errors.Join(killed, removed))
	}()
	n.doctor(t).want(t, "containers", "warning", "1 container on overlayfs: container old", "drain", "images")
	check(t, os.Remove(n.Blob(n.pause.Layers[1].Digest)))
	n.doctor(t).want(t, "pinned-images", "warning", n.pause.Ref, "import or pull it again", "containers", "images")
}

// TestOrphan: containerd has forgotten a snapshot, as when an image is removed while it runs without
// this snapshotter.
func TestOrphan(t *testing.T) {
	t.Parallel()
	n := newNode(t, options{})
	const key = kit.CRINamespace + "/997/of-nothing"
	sn := kittest.Connect(t, n.Daemon)
	// The collection that a start of the daemon asks containerd for may take the first.
	for err := errors.New("not prepared yet"); err != nil; _, err = sn.Stat(t.Context(), key) {
		_, failed := sn.Prepare(t.Context(), key, "")
		check(t, failed)
		time.Sleep(11 * time.Second) // younger ones may be in flight
	}
	n.doctor(t).want(t, "orphans", "warning", key, "repair --orphans --apply")
	check(t, errors.Join(sn.Remove(t.Context(), key), sn.(snapshots.Cleaner).Cleanup(t.Context())))
	n.doctor(t).silent(t)
}

// TestDamage: what a verification has found is reported, by the running daemon.
func TestDamage(t *testing.T) {
	// Not in parallel: the boot is that of all daemons.
	n := newNode(t, options{daemon: "content_root = ''"})
	for _, s := range kittest.Inspect(t, n.Daemon).Snapshots {
		if strings.HasSuffix(s.Name, "/"+n.app.Top()) {
			check(t, os.Remove(filepath.Join(n.Daemon.LayerDir(s.ID), "own", "name")))
		}
	}
	// As after a power cut: layers are verified.
	check(t, n.Daemon.Kill())
	check(t, kit.NewBoot())
	check(t, n.Daemon.Start(t.Context()))
	var all findings
	kittest.WaitFor(t, time.Minute, func() error {
		if all = n.doctor(t); all.of(t, "shutdown").Level != "failure" {
			return fmt.Errorf("not verified yet: %+v", all.of(t, "shutdown"))
		}
		return nil
	})
	all.want(t, "shutdown", "failure", n.app.Top(), "repair", "content-root", "images", "shutdown")
}

// TestClock: the journal has been written under a clock that was ahead, as before the time was set
// on a machine without a battery. The verb has the right clock.
func TestClock(t *testing.T) {
	t.Parallel()
	n := &node{Node: kittest.NewNode(t, kit.NodeOptions{Daemon: kit.DaemonOptions{
		Binary: must[string](t)(defects.Clock()), Env: []string{fmt.Sprintf("CLOCK_OFFSET=%d", int((48 * time.Hour).Seconds()))},
	}})}
	t.Cleanup(func() { kittest.Stop(t, n.Daemon.Process) })
	check(t, n.Daemon.Start(t.Context()))
	kittest.MakeLayer(t, n.Daemon, "layer")
	// No containerd runs here.
	n.doctor(t).want(t, "clock", "warning", "the journal has an entry of "+time.Now().Add(48*time.Hour).UTC().Format("2006-01-02"), "chrony", "plugin")
}

// TestUnit: what systemd has on record, of a program in its place.
func TestUnit(t *testing.T) {
	t.Parallel()
	bin := scratch(t)
	n := &node{Node: kittest.NewNode(t, kit.NodeOptions{Daemon: kit.DaemonOptions{VerbEnv: []string{"PATH=" + bin + ":" + os.Getenv("PATH")}}})}
	const loaded = "LoadState=loaded\nUnitFileState=%s\nBefore=%s\nWantedBy=%s\nRequiredBy=%s"
	for _, c := range []struct{ name, service, level, text, cure string }{
		{"none", "LoadState=not-found\nUnitFileState=", "warning", "no unit durable-snapshotter.service", "install the package"},
		{"disabled", fmt.Sprintf(loaded, "disabled", "k3s.service", "", ""), "failure", "is disabled", "systemctl enable durable-snapshotter"},
		{"not ordered", fmt.Sprintf(loaded, "enabled", "containerd.service", "multi-user.target", ""), "warning", "not ordered before k3s.service", "Before=k3s.service"},
		{"with containerd", fmt.Sprintf(loaded, "enabled", "k3s.service", "containerd.service", ""), "warning", "started only with containerd.service", "multi-user.target"},
		{"required", fmt.Sprintf(loaded, "enabled", "k3s.service", "multi-user.target", "k3s.service"), "warning", "k3s.service requires", "RequiredBy="},
		{"right", fmt.Sprintf(loaded, "enabled", "k3s.service", "multi-user.target", ""), "ok", "starts before containerd", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			script := "#!/bin/sh\ncase \"$2\" in\ndurable-snapshotter.service) cat <<'E'\n" + c.service + "\nE\n;;\nk3s.service) echo LoadState=loaded;;\n*) echo LoadState=not-found;;\nesac\n"
			check(t, os.WriteFile(filepath.Join(bin, "systemctl"), []byte(script), 0o755))
			if f := n.doctor(t).of(t, "unit"); f.Level != c.level || !strings.Contains(f.Text, c.text) || !strings.Contains(f.Cure, c.cure) {
				t.Errorf("%+v", f)
			}
		})
	}
}

// TestDisk: file systems that do not keep the promise, or are nearly full. The daemon accepts
// these, with a warning.
func TestDisk(t *testing.T) {
	for _, c := range []struct {
		name              string
		disk              kit.DiskOptions
		level, text, cure string
		check             string
		fill              float64
	}{
		{name: "no journal", disk: kit.DiskOptions{FS: "ext4", Mkfs: []string{"-O", "^has_journal"}}, check: "journal", level: "failure", text: "has no journal", cure: "has_journal"},
		{name: "writeback", disk: kit.DiskOptions{FS: "ext4", Mount: "data=writeback"}, check: "journal", level: "warning", text: "data=writeback", cure: "data=ordered"},
		{name: "nobarrier", disk: kit.DiskOptions{FS: "ext4", Mount: "nobarrier"}, check: "journal", level: "failure", text: "nobarrier", cure: "barrier=1"},
		{name: "nearly full", disk: kit.DiskOptions{FS: "ext4", Size: 256 << 20}, check: "space", level: "warning", text: "are free", cure: "enlarge", fill: 0.90},
		{name: "full", disk: kit.DiskOptions{FS: "ext4", Size: 256 << 20}, check: "space", level: "failure", text: "pulls fail", cure: "enlarge", fill: 0.99},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			n := &node{Node: kittest.NewNode(t, kit.NodeOptions{Disk: c.disk})}
			t.Cleanup(func() { kittest.Stop(t, n.Daemon.Process) })
			check(t, n.Daemon.Start(t.Context()))
			if c.fill > 0 {
				var st unix.Statfs_t
				check(t, unix.Statfs(n.Path(), &st))
				f := must[*os.File](t)(os.Create(n.Path("filler")))
				size := int64(c.fill*float64(st.Blocks)-float64(st.Blocks-st.Bavail)) * int64(st.Bsize)
				check(t, errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, size), f.Close()))
			}
			// No containerd runs here.
			n.doctor(t).want(t, c.check, c.level, c.text, c.cure, "plugin", "content-root", "journal")
		})
	}
	t.Run("tmpfs", func(t *testing.T) {
		t.Parallel()
		n := &node{Node: kittest.NewNode(t, kit.NodeOptions{Volume: scratch(t)})}
		n.doctor(t).want(t, "filesystem", "failure", "nothing on it survives a power cut", "ext4, xfs or btrfs", "plugin", "sockets", "content-root")
	})
}

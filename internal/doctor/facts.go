package doctor

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

// Config is what is examined.
type Config struct {
	Root, Address, Admin string // of the daemon: its directory, its sockets
	ContentRoot          string
	Sources              blobs.Source // what damaged layers are healed from
	RepairImages         bool         // the daemon checks images after an unclean shutdown
	Containerd           string       // socket of containerd
	Snapshotter          string       // name of this snapshotter in containerd's proxy_plugins
	File                 string       // containerd's main file; "": that of the running one, or the default
	// Report requests the report of the daemon that serves Address.
	Report func(context.Context) (snapshotter.Report, error)
}

// Facts are what checks judge by.
type Facts struct {
	Config
	Now     time.Time
	Host    Host
	Sockets []Socket
	Unit    Unit

	Live      string // root of the daemon that answers, "" when none does
	Report    snapshotter.Report
	ReportErr error

	Running Running
	Files   Files
	Content Content
}

// Host are facts about the machine.
type Host struct {
	Kernel   string
	Boot     string // ID of this boot
	Overlay  bool   // the kernel has overlayfs
	FSErr    error  // why the file system of the root cannot be used
	Warnings []fsync.Warning
	Disk     Disk
	Sync     time.Duration // of a syncfs of the root
	SyncErr  error
	Dirty    int64    // bytes of the page cache of the machine before it
	Sharing  []string // directories of databases on the file system of the root
	Space    Space
	SELinux  bool   // enforcing
	Label    string // of the root
}

// within bounds each question to another process.
const within = time.Minute

// Gather takes the facts. The error is that of ctx.
func Gather(ctx context.Context, c Config) (*Facts, error) {
	f := &Facts{Config: c, Now: time.Now()}
	f.Host = host(ctx, c.Root)
	for _, path := range []string{c.Address, c.Admin} {
		f.Sockets = append(f.Sockets, socket(path))
	}
	report, err := c.Report(ctx)
	if err == nil {
		f.Live = report.Root
	}
	if err != nil || report.Root != c.Root {
		report, f.ReportErr = snapshotter.InspectRoot(ctx, c.Root)
	}
	f.Report = report
	f.Running = running(ctx, c)
	f.Files = files(ctx, c.File, f.Running.PID)
	f.Unit = units(ctx, f.Running.PID)
	f.Content = examine(ctx, f)
	return f, ctx.Err()
}

func host(ctx context.Context, root string) (h Host) {
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		h.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	h.Boot, _ = layout.BootID()
	text, _ := os.ReadFile("/proc/filesystems")
	h.Overlay = slices.Contains(strings.Fields(string(text)), "overlay")
	// Before the first start of the daemon there is no root: it is made below the closest directory.
	at := root
	for at != "/" {
		if _, err := os.Stat(at); !errors.Is(err, os.ErrNotExist) {
			break
		}
		at = filepath.Dir(at)
	}
	if h.Warnings, h.FSErr = fsync.Inspect(at); h.FSErr != nil {
		return h
	}
	h.Disk = blockDevice(at)
	h.Dirty = dirty()
	h.Sync, h.SyncErr = timeSync(ctx, at)
	for _, dir := range []string{
		"/var/lib/etcd", "/var/lib/k0s/etcd", "/var/lib/rancher/k3s/server/db", "/var/lib/rancher/rke2/server/db",
		"/var/snap/microk8s/current/var/kubernetes/backend", "/var/lib/postgresql", "/var/lib/mysql",
	} {
		if same, err := fsync.SameFilesystem(at, dir); err == nil && same {
			h.Sharing = append(h.Sharing, dir)
		}
	}
	var st unix.Statfs_t
	if unix.Statfs(at, &st) == nil {
		h.Space = Space{st.Blocks * uint64(st.Bsize), st.Bavail * uint64(st.Bsize), st.Files, st.Ffree}
	}
	enforce, _ := os.ReadFile("/sys/fs/selinux/enforce")
	h.SELinux = strings.TrimSpace(string(enforce)) == "1"
	buf := make([]byte, 256)
	if n, err := unix.Getxattr(at, "security.selinux", buf); err == nil {
		h.Label = strings.TrimRight(string(buf[:n]), "\x00")
	}
	return h
}

// blockDevice finds the disk below a directory in /sys.
func blockDevice(path string) (d Disk) {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return d
	}
	return diskAt("/sys/dev/block", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)))
}

// dirty is how many bytes of the page cache wait to be written.
func dirty() (bytes int64) {
	text, _ := os.ReadFile("/proc/meminfo")
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 1 && (f[0] == "Dirty:" || f[0] == "Writeback:") {
			bytes += number(f[1]) << 10
		}
	}
	return bytes
}

// timeSync syncs the file system of a directory. The kernel cannot be kept from finishing what
// takes longer than the limit.
func timeSync(ctx context.Context, path string) (time.Duration, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	began, done := time.Now(), make(chan error, 1)
	go func() {
		defer f.Close()
		done <- unix.Syncfs(int(f.Fd()))
	}()
	select {
	case err = <-done:
	case <-ctx.Done():
	case <-time.After(within):
	}
	return time.Since(began), err
}

func socket(path string) (s Socket) {
	s.Path = path
	st, err := os.Lstat(path)
	if err != nil {
		s.Err = err
		return s
	}
	s.Mode = st.Mode()
	_, s.Refuse = listener(path)
	return s
}

// listener is the process that has made a unix socket listen.
func listener(path string) (pid int, err error) {
	conn, err := net.DialTimeout("unix", path, within)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid, errors.Join(err, cerr)
}

// units requests from systemd what it has on record. pid is that of containerd, 0 when it does not run.
func units(ctx context.Context, pid int) (u Unit) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	show := func(unit string, properties ...string) (map[string]string, error) {
		out, err := exec.CommandContext(ctx, "systemctl", "show", unit, "--property="+strings.Join(properties, ",")).Output()
		values := map[string]string{}
		for line := range strings.Lines(string(out)) {
			k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
			values[k] = v
		}
		return values, err
	}
	service, err := show("durable-snapshotter.service", "LoadState", "UnitFileState", "Before", "WantedBy", "RequiredBy")
	if err != nil || service["LoadState"] == "" {
		u.Err = errors.New("no systemd answers here")
		return u
	}
	u.Loaded, u.File = service["LoadState"] == "loaded", service["UnitFileState"]
	u.Before, u.WantedBy, u.RequiredBy = strings.Fields(service["Before"]), strings.Fields(service["WantedBy"]), strings.Fields(service["RequiredBy"])
	if s, err := show("durable-snapshotter.socket", "UnitFileState"); err == nil {
		u.Socket = s["UnitFileState"]
	}
	own := unitOf(pid)
	for _, name := range containerdUnits {
		s, err := show(name, "LoadState")
		// docker.service has a containerd of its own only where there is no other.
		if err == nil && s["LoadState"] == "loaded" && (name != "docker.service" || own == name) {
			u.Containerd = append(u.Containerd, name)
		}
	}
	if own != "" && !slices.Contains(u.Containerd, own) {
		u.Containerd = append(u.Containerd, own)
	}
	return u
}

// unitOf is the service that a process belongs to, "" when it is of none.
func unitOf(pid int) string {
	text, _ := os.ReadFile(procPath(pid, "cgroup"))
	for line := range strings.Lines(string(text)) {
		for part := range strings.SplitSeq(strings.TrimSpace(line), "/") {
			if strings.HasSuffix(part, ".service") {
				return part
			}
		}
	}
	return ""
}

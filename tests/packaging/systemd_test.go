package packaging

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

const (
	unit   = "durable-snapshotter.service"
	socket = "/run/durable-snapshotter/durable-snapshotter.sock"
	state  = "/var/lib/durable-snapshotter"
)

// noShares is a flag of ctr run: the machine has no controllers of resources.
const noShares = "--cpu-shares=0"

// systemdPackages is what a machine with systemd has, beside a minimal Debian.
var systemdPackages = []string{"systemd", "systemd-sysv", "runc", "procps", "rpm"}

// long is what anything may take that a test waits for.
const long = 2 * time.Minute

// systemdNode is a machine with systemd, and containerd as a service of it.
type systemdNode struct {
	*kit.Machine
	root string
	disk *kit.Disk // of the root
}

func (n *systemdNode) boot(t *testing.T) {
	t.Helper()
	n.Machine = kittest.StartMachine(t, n.root, "/lib/systemd/systemd")
	kittest.WaitFor(t, long, func() error {
		out, err := n.Run(t.Context(), "systemctl", "is-system-running")
		if s := strings.TrimSpace(out); s == "running" {
			return nil
		}
		failed, _ := n.Run(t.Context(), "systemctl", "--failed", "--no-legend")
		return fmt.Errorf("the machine is %q: %w: %s", out, err, failed)
	})
}

// shutDown is an orderly end of the machine.
func (n *systemdNode) shutDown(t *testing.T) {
	t.Helper()
	_, _ = n.Run(t.Context(), "systemctl", "poweroff") // it may be killed before it can return
	select {
	case <-n.Done():
	case <-time.After(2 * long):
		t.Fatal("the machine has not ended after poweroff")
	}
}

// cutPower ends the machine as a power cut does, and boots it again.
func (n *systemdNode) cutPower(t *testing.T) {
	t.Helper()
	check(t, n.disk.Shutdown())
	check(t, n.Kill())
	check(t, n.disk.Remount())
	n.boot(t)
}

// write makes a file of the system, which does not run yet.
func (n *systemdNode) write(t *testing.T, name, text string, mode os.FileMode) {
	t.Helper()
	path := filepath.Join(n.root, name)
	check(t, os.MkdirAll(filepath.Dir(path), 0o755))
	check(t, os.WriteFile(path, []byte(text), mode))
}

// service makes a service that starts a containerd at boot.
func (n *systemdNode) service(t *testing.T, name string, lines ...string) {
	t.Helper()
	n.write(t, "etc/systemd/system/"+name, "[Service]\nType=notify\n"+strings.Join(lines, "\n")+
		"\nKillMode=process\nDelegate=yes\n[Install]\nWantedBy=multi-user.target\n", 0o644)
	command(t, "", nil, "chroot", n.root, "systemctl", "enable", name)
}

// newSystemdNode is a node with kit's containerd, without its CRI plugin.
func newSystemdNode(t *testing.T) *systemdNode {
	n := &systemdNode{}
	n.root, n.disk = kittest.NewSystem(t, systemdPackages...)
	kittest.InstallContainerd(t, filepath.Join(n.root, "usr/local/bin"))
	n.write(t, "etc/containerd/config.toml", fmt.Sprintf(`version = 3
disabled_plugins = ['io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime', 'io.containerd.grpc.v1.cri']
[proxy_plugins.durable]
  type = "snapshot"
  address = %q
  [proxy_plugins.durable.exports]
    root = %q
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux/%[3]s"
  snapshotter = "durable"
  differ = "walking"
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "linux/%[3]s"
  snapshotter = "overlayfs"
  differ = "walking"
`, socket, state, runtime.GOARCH), 0o644)
	n.service(t, "containerd.service", "ExecStart=/usr/local/bin/containerd")
	n.boot(t)
	return n
}

// dpkg installs a package of a release.
func (n *systemdNode) dpkg(t *testing.T, dir string) string {
	t.Helper()
	command(t, "", nil, "cp", the(t, dir+"/*.deb"), n.Path("/root/durable-snapshotter.deb"))
	return in(t, n.Machine, "dpkg", "--install", "/root/durable-snapshotter.deb")
}

func (n *systemdNode) property(t *testing.T, unit, name string) string {
	t.Helper()
	return strings.TrimSpace(in(t, n.Machine, "systemctl", "show", "--value", "-p", name, unit))
}

func (n *systemdNode) number(t *testing.T, unit, name string) int {
	t.Helper()
	return must[int](t)(strconv.Atoi(n.property(t, unit, name)))
}

// healthy is a call over a connection of its own, as a client makes it: without
// waiting for a server that refuses connections.
func (n *systemdNode) healthy(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, long)
	defer cancel()
	return (&kit.Daemon{Address: n.Path(socket)}).Healthy(ctx)
}

func (n *systemdNode) waitActive(t *testing.T) {
	t.Helper()
	kittest.WaitFor(t, long, func() error {
		out, err := n.Run(t.Context(), "systemctl", "is-active", unit)
		if strings.TrimSpace(out) != "active" {
			return fmt.Errorf("%s is %q: %w", unit, out, err)
		}
		return n.healthy(t.Context())
	})
}

func (n *systemdNode) enabled(t *testing.T) {
	t.Helper()
	for _, name := range []string{unit, "durable-snapshotter.socket"} {
		if got := strings.TrimSpace(in(t, n.Machine, "systemctl", "is-enabled", name)); got != "enabled" {
			t.Errorf("%s is %s", name, got)
		}
	}
}

func (n *systemdNode) ctr(t *testing.T, args ...string) string {
	t.Helper()
	return in(t, n.Machine, append([]string{"ctr"}, args...)...)
}

// meanwhile makes one call after another until do is over, and at least one after
// that; every one must succeed.
func (n *systemdNode) meanwhile(t *testing.T, do func()) (calls int) {
	t.Helper()
	over := make(chan struct{})
	var failures []error
	var background sync.WaitGroup
	background.Go(func() {
		for last := false; !last; {
			select {
			case <-over:
				last = true
			default:
			}
			time.Sleep(5 * time.Millisecond)
			calls++
			if err := n.healthy(t.Context()); err != nil {
				failures = append(failures, err)
			}
		}
	})
	defer func() {
		background.Wait()
		for _, err := range failures {
			t.Errorf("a call meanwhile: %v", err)
		}
	}()
	defer close(over)
	do()
	return calls
}

// TestSystemd is the life of an installation from the deb: installed beside a running
// containerd, booted with it, pulls and containers, a killed daemon, a restart, an
// upgrade, a purge, and the same state taken up again.
func TestSystemd(t *testing.T) {
	onMachines(t)
	needs(t, "debootstrap")
	first, second := release(t, "v1.0.0"), release(t, "v1.1.0")
	image := images.Get(t, "runnable")
	n := newSystemdNode(t)

	if out := n.dpkg(t, first); !strings.Contains(out, "enabled and started") {
		t.Errorf("dpkg --install: %q", out)
	}
	n.waitActive(t)
	n.enabled(t)
	if out := in(t, n.Machine, "stat", "-c", "%a", "/run/durable-snapshotter", socket, filepath.Dir(socket)+"/admin.sock"); out != "700\n600\n600\n" {
		t.Errorf("modes of the directory of the sockets and of both: %q", out)
	}
	if out := in(t, n.Machine, "durable-snapshotter", "health"); out != "serving\n" {
		t.Errorf("health: %q", out)
	}
	n.shutDown(t)
	n.boot(t)
	ready := n.number(t, unit, "ActiveEnterTimestampMonotonic")
	if begun := n.number(t, "containerd.service", "InactiveExitTimestampMonotonic"); ready == 0 || begun < ready {
		t.Errorf("the daemon was ready at %d µs, and containerd began to start at %d µs", ready, begun)
	}
	if out := in(t, n.Machine, "durable-snapshotter", "inspect"); out == "" {
		t.Error("inspect prints nothing")
	}

	n.ctr(t, "image", "pull", "--plain-http", "--snapshotter", "durable", image.Ref)
	n.run(t, image.Ref)
	in(t, n.Machine, "sh", "-c", `test "$(systemctl show --value -p OOMScoreAdjust `+unit+`)" = -999`)
	n.ctr(t, "run", noShares, "-d", "--snapshotter", "durable", image.Ref, "stays", "/bin/guest", "wait")
	if got := in(t, n.Machine, "stat", "-c", "%a", "/run/containerd/io.containerd.runtime.v2.task/default/stays/rootfs"); got != "755\n" {
		t.Errorf("the mode of a container's root directory is %q: users in it need to enter", got)
	}
	spared(t, n.Machine, n.number(t, unit, "MainPID"))
	t.Run("Kill", func(t *testing.T) { n.testKill(t) })
	t.Run("Restart", func(t *testing.T) {
		calls := n.meanwhile(t, func() {
			for range 10 {
				before := n.number(t, unit, "MainPID")
				in(t, n.Machine, "systemctl", "restart", unit)
				if now := n.number(t, unit, "MainPID"); now == before {
					t.Error("the daemon was not restarted")
				}
			}
		})
		t.Logf("%d calls during 10 restarts", calls)
	})
	t.Run("Upgrade", func(t *testing.T) {
		before := n.number(t, unit, "MainPID")
		calls := n.meanwhile(t, func() { n.dpkg(t, second) })
		if now := n.number(t, unit, "MainPID"); now == before {
			t.Error("the daemon was not restarted")
		}
		if out := in(t, n.Machine, fmt.Sprintf("/proc/%d/exe", n.number(t, unit, "MainPID")), "version"); !strings.HasPrefix(out, "durable-snapshotter v1.1.0 ") {
			t.Errorf("after the upgrade, this runs: %q", out)
		}
		t.Logf("%d calls during an upgrade", calls)
	})
	n.stillRuns(t)
	n.run(t, image.Ref)
	t.Run("Purge", func(t *testing.T) { n.testPurge(t, image, second) })
	t.Run("RPM", func(t *testing.T) { n.testRPM(t, first, second) })
	t.Run("Install", func(t *testing.T) { n.testInstall(t) })
}

// run runs containers of the image to their end, until one has printed its line: ctr
// can lose the output of one that ends at once. All of them have to end without error.
func (n *systemdNode) run(t *testing.T, ref string) {
	t.Helper()
	kittest.WaitFor(t, long, func() error {
		if out := n.ctr(t, "run", noShares, "--rm", "--snapshotter", "durable", ref, "once"); out != "hello from the image\n" {
			return fmt.Errorf("ctr run: %q", out)
		}
		return nil
	})
}

// stillRuns verifies that the container of before has gone through what has happened.
func (n *systemdNode) stillRuns(t *testing.T) {
	t.Helper()
	for line := range strings.Lines(n.ctr(t, "task", "ls")) {
		if f := strings.Fields(line); slices.Equal(f[:1], []string{"stays"}) && f[2] == "RUNNING" {
			return
		}
	}
	t.Error("the container that ran before does not run any more")
}

// testKill kills the daemon again and again. A client that calls while it is dead
// waits until systemd has started it again, and so does containerd.
func (n *systemdNode) testKill(t *testing.T) {
	for i := range 3 {
		before := n.number(t, unit, "MainPID")
		check(t, n.KillOne(before))
		begun := time.Now()
		// The unit waits for 500 ms before it starts again: no process serves now.
		check(t, n.healthy(t.Context()))
		waited := time.Since(begun)
		if i > 0 {
			// containerd's connection has ended with the daemon.
			n.waitActive(t)
		}
		if out := n.ctr(t, "snapshot", "--snapshotter", "durable", "ls"); !strings.Contains(out, "Committed") {
			t.Errorf("containerd's list after a kill: %q", out)
		}
		n.waitActive(t)
		if now := n.number(t, unit, "MainPID"); now == before || now == 0 {
			t.Errorf("the daemon was process %d, and is %d after a kill", before, now)
		}
		t.Logf("a client that called %v after the kill was answered after %v", time.Since(begun)-waited, waited)
	}
	if restarts := n.number(t, unit, "NRestarts"); restarts < 3 {
		t.Errorf("%d restarts after 3 kills", restarts)
	}
	n.stillRuns(t)
}

// testPurge: the state stays, and the output says so; containerd, its containers and
// other snapshotters run on. A new installation takes up the state.
func (n *systemdNode) testPurge(t *testing.T, image kit.Pushed, release string) {
	containerd := n.number(t, "containerd.service", "MainPID")
	in(t, n.Machine, "dpkg", "--remove", "durable-snapshotter")
	n.dpkg(t, release)
	n.waitActive(t)
	n.enabled(t)
	out := in(t, n.Machine, "sh", "-c", "dpkg --purge durable-snapshotter 2>&1")
	if !strings.Contains(out, state+" is kept") {
		t.Errorf("dpkg --purge: %q", out)
	}
	in(t, n.Machine, "test", "-s", state+"/metadata.db")
	for _, path := range []string{"/usr/bin/durable-snapshotter", socket, "/usr/lib/systemd/system/" + unit, "/etc/systemd/system/multi-user.target.wants/" + unit} {
		in(t, n.Machine, "test", "!", "-e", path, "-a", "!", "-L", path)
	}
	if got := n.property(t, unit, "ActiveState"); got != "inactive" {
		t.Errorf("after a purge, the unit is %s", got)
	}
	if now := n.number(t, "containerd.service", "MainPID"); now != containerd {
		t.Error("containerd was restarted by a purge")
	}
	n.stillRuns(t)
	n.ctr(t, "image", "pull", "--plain-http", "--snapshotter", "overlayfs", image.Ref)

	n.dpkg(t, release)
	n.waitActive(t)
	n.run(t, image.Ref)
}

// testRPM is the same life in short, with the package of the other kind.
func (n *systemdNode) testRPM(t *testing.T, first, second string) {
	in(t, n.Machine, "dpkg", "--purge", "durable-snapshotter")
	rpm := func(action, dir string) {
		command(t, "", nil, "cp", the(t, dir+"/*.rpm"), n.Path("/root/durable-snapshotter.rpm"))
		// Debian's rpm knows none of the packages that are installed.
		in(t, n.Machine, "rpm", action, "--nodeps", "/root/durable-snapshotter.rpm")
		n.waitActive(t)
		n.enabled(t)
	}
	rpm("--install", first)
	before := n.number(t, unit, "MainPID")
	calls := n.meanwhile(t, func() { rpm("--upgrade", second) })
	if now := n.number(t, unit, "MainPID"); now == before {
		t.Error("the daemon was not restarted by an upgrade")
	}
	t.Logf("%d calls during an upgrade", calls)
	if out := in(t, n.Machine, "sh", "-c", "rpm --erase durable-snapshotter 2>&1"); !strings.Contains(out, state+" is kept") {
		t.Errorf("rpm --erase: %q", out)
	}
	in(t, n.Machine, "test", "-s", state+"/metadata.db")
	in(t, n.Machine, "test", "!", "-e", "/usr/bin/durable-snapshotter", "-a", "!", "-L", "/etc/systemd/system/multi-user.target.wants/"+unit)
	n.stillRuns(t)
}

// testInstall is the same for what make install and make uninstall run.
func (n *systemdNode) testInstall(t *testing.T) {
	source := n.Path("/root/source")
	check(t, os.Mkdir(source, 0o755))
	command(t, "", nil, "cp", "-r", packagingDir, "../../LICENSE", "../../config.toml.example", kittest.Binaries(t).Daemon, source)
	script := "/root/source/packaging/install.sh"
	if out := in(t, n.Machine, "env", "BIN=/root/source/durable-snapshotter", script, "install"); !strings.Contains(out, "systemctl enable --now durable-snapshotter\n") {
		t.Errorf("install: %q", out)
	}
	in(t, n.Machine, "systemctl", "enable", "--now", "durable-snapshotter")
	n.waitActive(t)
	n.enabled(t)
	if exe := in(t, n.Machine, "readlink", fmt.Sprintf("/proc/%d/exe", n.number(t, unit, "MainPID"))); exe != "/usr/local/bin/durable-snapshotter\n" {
		t.Errorf("after an installation, %q runs", exe)
	}
	if out := in(t, n.Machine, script, "uninstall"); !strings.Contains(out, state+" is kept") {
		t.Errorf("uninstall: %q", out)
	}
	in(t, n.Machine, "test", "!", "-e", "/usr/local/bin/durable-snapshotter", "-a", "!", "-e", socket, "-a", "!", "-L", "/etc/systemd/system/multi-user.target.wants/"+unit)
	in(t, n.Machine, "test", "-s", state+"/metadata.db")
	n.stillRuns(t)
}

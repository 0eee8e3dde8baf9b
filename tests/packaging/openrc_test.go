package packaging

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// openrcStub is a service in the place of one that runs a containerd: it records what
// the daemon answers when it starts. It has no dependencies of its own.
const openrcStub = `#!/sbin/openrc-run
start() { /usr/local/bin/durable-snapshotter health >/run/$RC_SVCNAME.saw 2>&1; return 0; }
`

// TestOpenRC: from the tarball, the daemon is started at boot before what runs a
// containerd, is started again when it was killed, and stops.
func TestOpenRC(t *testing.T) {
	onMachines(t)
	needs(t, "debootstrap")
	root, _ := kittest.NewSystem(t, "openrc", "procps")
	command(t, "", nil, "tar", "-C", filepath.Join(root, "usr/local"), "-xzf", the(t, release(t, "v1.0.0")+"/*.tar.gz"))
	command(t, "", nil, "install", "-m", "0755", filepath.Join(root, "usr/local/share/durable-snapshotter/openrc/durable-snapshotter"), filepath.Join(root, "etc/init.d"))
	stubs := []string{"containerd", "k3s"} // before and after the daemon in the order of the alphabet
	for _, name := range stubs {
		check(t, os.WriteFile(filepath.Join(root, "etc/init.d", name), []byte(openrcStub), 0o755))
	}
	for _, name := range append(stubs, "durable-snapshotter") {
		command(t, "", nil, "chroot", root, "rc-update", "add", name, "default")
	}
	// These are about hardware, or mount what the machine has.
	for _, name := range []string{"cgroups", "hwclock.sh", "procps"} {
		check(t, os.Remove(filepath.Join(root, "etc/runlevels/sysinit", name)))
	}
	m := kittest.StartMachine(t, root, "/sbin/openrc-init")
	kittest.WaitFor(t, long, func() error {
		out, err := m.Run(t.Context(), "rc-status", "--format=ini", "default")
		if err == nil && strings.Count(out, "started") < 3 {
			err = fmt.Errorf("the runlevel: %s", out)
		}
		return err
	})
	for _, name := range stubs {
		if out := in(t, m, "cat", "/run/"+name+".saw"); out != "serving\n" {
			t.Errorf("when %s starts, the daemon answers %q", name, out)
		}
	}
	before := openrcDaemon(t, m)
	spared(t, m, before)
	check(t, m.KillOne(before))
	kittest.WaitFor(t, long, func() error {
		_, err := m.Run(t.Context(), "durable-snapshotter", "health")
		return err
	})
	if now := openrcDaemon(t, m); now == before {
		t.Errorf("the daemon is process %d before and after a kill", now)
	}
	in(t, m, "rc-service", "durable-snapshotter", "stop")
	if out, err := m.Run(t.Context(), "durable-snapshotter", "health"); err == nil {
		t.Errorf("after a stop, health prints %q", out)
	}
	if out, err := m.Run(t.Context(), "pgrep", "-f", openrcCommand); err == nil {
		t.Errorf("after a stop, processes are there: %q", out)
	}
}

// openrcCommand is the daemon's command line, and not that of its supervisor.
const openrcCommand = "^/usr/local/bin/durable-snapshotter serve$"

func openrcDaemon(t *testing.T, m *kit.Machine) int {
	t.Helper()
	return must[int](t)(strconv.Atoi(strings.TrimSpace(in(t, m, "pgrep", "-f", openrcCommand))))
}

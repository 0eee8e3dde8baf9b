package noharm

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/defects"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// descriptors leaves the daemon those that it has: a new one would have to be
// below 3, and 0 to 2 are in use.
func (n *node) descriptors(t testing.TB) (restore func()) {
	t.Helper()
	var old unix.Rlimit
	pid := n.Daemon.PID()
	check(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &old))
	few := unix.Rlimit{Cur: 3, Max: old.Max}
	check(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, &few, nil))
	return func() { check(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, &old, nil)) }
}

// noDescriptors lets the daemon verify all layers while it cannot open a file,
// by itself and for callers that had their connection before.
func noDescriptors(t testing.TB, n *node) func() {
	n.rebooted(t)
	sn := n.client(t)
	_, _ = sn.Stat(t.Context(), n.names[0]) // connects
	restore := n.descriptors(t)
	for until := time.Now().Add(2 * time.Second); time.Now().Before(until); time.Sleep(100 * time.Millisecond) {
		_ = n.statAll(t, sn)
	}
	restore()
	return nil
}

// rebooted starts the daemon alone, on a machine that was not shut down: it has
// everything to verify.
func (n *node) rebooted(t testing.TB) {
	t.Helper()
	check(t, n.Daemon.Kill())
	check(t, kit.NewBoot())
	check(t, n.Daemon.Start(t.Context()))
}

// decompressorKilled makes each unpigz die at once, as the kernel's OOM killer
// does with the largest process.
func decompressorKilled(t testing.TB, n *node) func() {
	check(t, os.WriteFile(n.killSwitch(), nil, 0o644))
	return func() { check(t, os.Remove(n.killSwitch())) }
}

// killedWhileVerifying kills the daemon at several instants after its start.
func killedWhileVerifying(t testing.TB, n *node) func() {
	for i := range 4 {
		check(t, n.Daemon.Kill())
		check(t, kit.NewBoot())
		check(t, n.Daemon.Launch())
		time.Sleep(time.Duration(i*70) * time.Millisecond) // any instant will do
	}
	n.rebooted(t)
	return nil
}

// sideBySide runs verbs beside each other and beside the scrub.
func sideBySide(t testing.TB, n *node) func() {
	var all sync.WaitGroup
	for _, args := range [][]string{{"repair", "--deep", "--apply"}, {"repair", "--apply"}, {"check", "--deep"}, {"repair", "--deep", "--apply"}} {
		all.Go(func() { _, _ = n.results(t, args...) })
	}
	all.Wait()
	return nil
}

// clock runs the daemon with a clock that is years off, and then with one that
// is right: a board without a real-time clock, or with a dead one.
func clock(year int) func(testing.TB, *node) func() {
	return func(t testing.TB, n *node) func() {
		offset := time.Until(time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC))
		n.setEnv(t, "DAEMON="+must[string](t)(defects.Clock()), fmt.Sprintf("CLOCK_OFFSET=%d", int(offset.Seconds())))
		n.rebooted(t)
		// A round of scrubbing begins and ends at that time.
		waitFor(t, time.Minute, func() error {
			r, err := n.Daemon.Inspect(t.Context())
			if s := r.Journal.Scrub; err == nil && (s.Started.Year() != year && s.Started.Year() != year-1 || s.Finished.IsZero()) {
				err = fmt.Errorf("no round of scrubbing in the year %d: %+v", year, s)
			}
			return err
		})
		// containerd may still have the connection to the daemon of before.
		waitFor(t, time.Minute, func() error { return n.stat(t) })
		n.setEnv(t)
		n.rebooted(t)
		return nil
	}
}

// containerdDown ends containerd for a while: what it would be notified of, it is notified of
// afterwards.
func containerdDown(t testing.TB, n *node) func() {
	check(t, n.Containerd.Kill())
	n.down = true
	return func() {
		n.down = false
		check(t, n.StartContainerd(t.Context()))
	}
}

// scrubOff leaves the verification of layers to the calls that need it, as the daemon does
// unless it is configured otherwise.
func scrubOff(t testing.TB, n *node) func() {
	interval := n.interval
	n.interval = "0s"
	n.configure(t, n.ContentRoot())
	check(t, n.Daemon.Restart(t.Context()))
	return func() { n.interval = interval } // from the next start on
}

// away moves a file or a directory away, and back in the end.
func (n *node) away(t testing.TB, path string) func() {
	t.Helper()
	to := filepath.Join(n.dir, "away-"+filepath.Base(path))
	check(t, os.Rename(path, to))
	return func() { check(t, os.Rename(to, path)) }
}

// contentAway takes away what damaged layers are healed from.
func contentAway(t testing.TB, n *node) func() {
	return n.away(t, filepath.Join(n.ContentRoot(), "blobs"))
}

func sealAway(t testing.TB, n *node) func() {
	return n.away(t, filepath.Join(n.snapshot(n.ids[0]), "seal"))
}
func layerAway(t testing.TB, n *node) func() { return n.away(t, n.snapshot(n.ids[1])) }

// modesChanged changes modes in a layer, and changes them back, as an operator
// who notices that the wrong tree was meant.
func modesChanged(t testing.TB, n *node) func() {
	change := func(by int) {
		for _, name := range []string{"top/held", "top/big", "top/watched/a", "top/twin-a"} {
			path := n.layer(2, name)
			info := must[os.FileInfo](t)(os.Lstat(path))
			check(t, os.Chmod(path, info.Mode()+os.FileMode(by)))
		}
	}
	change(+0o020)
	return func() { change(-0o020) }
}

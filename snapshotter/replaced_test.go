package snapshotter

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mounts"
)

// sweeper is a machine with a daemon whose replaced trees may go at once.
type sweeper struct {
	*machine
	s    *Snapshotter
	ours []mounts.Device // overlay mounts of the test
}

// newSweeper has an image of two layers. complete says what the daemon believes
// of its view of the machine, which depends on where the tests run.
func newSweeper(t *testing.T, complete bool) *sweeper {
	t.Helper()
	w := &sweeper{machine: newMachine(t, 2)}
	w.start(complete)
	w.pull(w.s)
	return w
}

// start starts a daemon in the same boot.
func (w *sweeper) start(complete bool) {
	w.Helper()
	w.s = w.boot(w.boots > 0)
	w.s.trees.MountDelay = 0
	w.s.trees.ReadMounts = func() (mounts.Machine, error) {
		m, err := mounts.Read()
		m.Complete = complete
		// Other programs of the machine have detached mounts at times, and other tests
		// mount layers with the same numbers.
		others := func(d mounts.Device) bool { return !slices.Contains(w.ours, d) }
		m.Detached = slices.DeleteFunc(m.Detached, others)
		m.Mounts = slices.DeleteFunc(m.Mounts, func(m mounts.Mount) bool { return m.Type == "overlay" && others(m.Device) })
		return m, err
	}
}

// mount prepares a container, or a view of the base, and mounts it.
func (w *sweeper) mount(key string, view bool) (point string) {
	w.Helper()
	prepare, parent := w.s.Prepare, w.name(1)
	if view {
		prepare, parent = w.s.View, w.name(0)
	}
	ms, err := prepare(w.Context(), key, parent)
	fatal(w.T, err)
	point = w.TempDir()
	fatal(w.T, mount.All(ms, point))
	w.Cleanup(func() { _ = unix.Unmount(point, unix.MNT_DETACH) })
	var st unix.Stat_t
	fatal(w.T, unix.Stat(point, &st))
	w.ours = append(w.ours, mounts.Device{Major: unix.Major(st.Dev), Minor: unix.Minor(st.Dev)})
	return point
}

// heal damages the base layer and has it healed. The file dir/own0 is left.
func (w *sweeper) heal() {
	w.Helper()
	fatal(w.T, os.Remove(filepath.Join(w.tree(w.s, 0), "link")))
	done, err := w.s.layers.Repair(w.Context(), layers.RepairOptions{Apply: true})
	if err != nil || len(done) != 1 || !done[0].Healed {
		w.Fatal(done, err)
	}
}

// kept sweeps and fails unless so many trees are kept. Fewer may come a little later: an
// overlay mount of another process can have the device number that one of the test had.
func (w *sweeper) kept(when string, want int) {
	w.Helper()
	have := w.sweep()
	for end := time.Now().Add(20 * time.Second); len(have) > want && time.Now().Before(end); have = w.sweep() {
		time.Sleep(100 * time.Millisecond)
	}
	if len(have) != want {
		w.Errorf("%s: replaced/ holds %v, want %d", when, have, want)
	}
	if have := names(w.T, w.s.root.Removing()); len(have) > 0 {
		w.Errorf("%s: removing/ holds %v", when, have)
	}
}

// sweep returns the trees that are kept.
func (w *sweeper) sweep() []string {
	w.Helper()
	fatal(w.T, w.s.Cleanup(w.Context()))
	return names(w.T, w.s.root.Replaced())
}

// TestReplacedUnused: a tree that no mount uses goes with the next Cleanup, and
// not with the next boot.
func TestReplacedUnused(t *testing.T) {
	w := newSweeper(t, true)
	w.heal()
	w.kept("healed", 0)
	w.wantWhole(w.s)
}

// TestReplacedEarly: within mountDelay a mount may be on its way into the table
// of mounts.
func TestReplacedEarly(t *testing.T) {
	w := newSweeper(t, true)
	w.s.trees.MountDelay = time.Hour
	w.heal()
	w.kept("healed just now", 1)
	w.s.trees.MountDelay = 0
	w.kept("later", 0)
}

// TestReplacedMounted: the mount of a container that was there keeps the tree it
// reads from, also over a restart of the daemon, and that of a later one does not.
func TestReplacedMounted(t *testing.T) {
	w := newSweeper(t, true)
	old := w.mount("old", false)
	other := filepath.Join(w.tree(w.s, 0), "hard0") // own0 is hidden by the second layer
	want, err := os.ReadFile(other)
	fatal(t, err)
	w.heal()
	later := w.mount("later", false)
	w.kept("mounted", 1)
	stop(t, w.s)
	w.start(true)
	w.kept("after a restart", 1)
	unix.Sync()
	fatal(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0))
	if have, err := os.ReadFile(filepath.Join(old, "hard0")); err != nil || string(have) != string(want) {
		t.Errorf("the container reads %d bytes, %v; want %d", len(have), err, len(want))
	}
	fatal(t, unix.Unmount(old, 0))
	w.kept("unmounted", 0)
	if _, err := os.Readlink(filepath.Join(later, "link")); err != nil {
		t.Errorf("the later container: %v", err)
	}
}

// TestReplacedDetached: containerd unmounts lazily, and files may be open then.
// This is in no table of mounts.
func TestReplacedDetached(t *testing.T) {
	for _, first := range []bool{true, false} {
		w := newSweeper(t, true)
		old := w.mount("old", false)
		f, err := os.Open(filepath.Join(old, "hard0"))
		fatal(t, err)
		if first {
			fatal(t, unix.Unmount(old, unix.MNT_DETACH))
		}
		w.heal()
		if !first {
			w.kept("mounted", 1)
			fatal(t, unix.Unmount(old, unix.MNT_DETACH))
		}
		w.kept("open", 1)
		b := make([]byte, 9)
		if _, err := f.ReadAt(b, 0); err != nil || string(b) != "content 0" {
			t.Errorf("reads %q, %v", b, err)
		}
		fatal(t, f.Close())
		w.kept("closed", 0)
	}
}

// TestReplacedView: the view of one layer is a bind mount of its tree.
func TestReplacedView(t *testing.T) {
	w := newSweeper(t, true)
	view := w.mount("view", true)
	w.heal()
	w.kept("mounted", 1)
	if _, err := os.Stat(filepath.Join(view, "hard0")); err != nil {
		t.Errorf("the view: %v", err)
	}
	fatal(t, unix.Unmount(view, 0))
	w.kept("unmounted", 0)
}

// TestReplacedUnseen: where the daemon cannot see all processes, rows tell. One
// of a container that was there keeps the tree, whatever is mounted.
func TestReplacedUnseen(t *testing.T) {
	w := newSweeper(t, false)
	_, err := w.s.Prepare(t.Context(), "old", w.name(1))
	fatal(t, err)
	w.heal()
	_, err = w.s.Prepare(t.Context(), "later", w.name(1))
	fatal(t, err)
	w.kept("prepared before", 1)
	fatal(t, w.s.Remove(t.Context(), "old"))
	w.kept("removed", 0)
}

// TestReplacedUnknown: nothing is deleted while mounts are not known, and a tree
// without a note of its users is judged by what there is now.
func TestReplacedUnknown(t *testing.T) {
	w := newSweeper(t, true)
	known := w.s.trees.ReadMounts
	w.s.trees.ReadMounts = func() (mounts.Machine, error) { return mounts.Machine{Complete: true}, errors.New("as if") }
	w.heal()
	w.kept("not known", 1)
	w.s.trees.ReadMounts = known
	tree := filepath.Join(w.s.root.Replaced(), names(t, w.s.root.Replaced())[0])
	fatal(t, os.WriteFile(filepath.Join(tree, "users"), []byte("{"), 0o600))
	point := w.mount("old", false)
	w.kept("without a note", 1)
	fatal(t, unix.Unmount(point, 0))
	w.kept("unmounted", 0)
}

// TestHealingOfThisBoot: what a healing has left is judged by the boot in its
// name, whatever the journal says of the last boot.
func TestHealingOfThisBoot(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	crash(t, s)
	m.boots++ // whose first start could not write to the journal
	for _, name := range []string{"2.boot-1", "2.boot-2", "2"} {
		fatal(t, os.MkdirAll(filepath.Join(m.root, "healing", name, "fs"), 0o700))
	}
	fatal(t, os.MkdirAll(filepath.Join(m.root, "replaced", "2.boot-1.5", "fs"), 0o700))
	fatal(t, os.MkdirAll(filepath.Join(m.root, "replaced", "2.boot-22.5", "fs"), 0o700))
	s = m.boot(true)
	fatal(t, s.Cleanup(t.Context()))
	if left := names(t, s.root.Healing()); len(left) > 0 {
		t.Errorf("healing/ holds %v", left)
	}
	kept := names(t, s.root.Replaced())
	if len(kept) != 2 || layout.BootOf(kept[0], true) != "boot-2" || layout.BootOf(kept[1], true) != "boot-2" {
		t.Errorf("replaced/ holds %v", kept)
	}
}

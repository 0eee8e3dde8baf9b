package snapshotter

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

func fatal(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// logged collects what the daemon logs from now on.
func logged(t *testing.T) func() string {
	t.Helper()
	quiet(t)
	var b bytes.Buffer
	l := log.L.Logger
	out := l.Out
	l.SetOutput(&b) // the logger's own lock orders the writes
	t.Cleanup(func() { l.SetOutput(out) })
	return b.String
}

// restart is start for a test that reads the log.
func restart(t *testing.T, root string) *Snapshotter {
	t.Helper()
	s, err := New(t.Context(), Config{Root: root, NoBackground: true})
	fatal(t, err)
	t.Cleanup(func() { stop(t, s) })
	return s
}

// mountAt mounts until the end of the test, or skips it.
func mountAt(t *testing.T, source, target, kind string, flags uintptr, data string) {
	t.Helper()
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		t.Fatalf("mount %s: %v", target, err)
	}
	t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	fatal(t, err)
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

// TestRemoveKeepsMounted removes a snapshot with a host directory mounted in it.
// The directory keeps its content, the tree stays until it is unmounted, and the
// log says once which mount it is.
func TestRemoveKeepsMounted(t *testing.T) {
	s := start(t, t.TempDir())
	warnings := logged(t)
	_, err := s.Prepare(t.Context(), "container", "")
	fatal(t, err)
	dir := s.root.Dir(s.actives.Get("container").ID)
	point := filepath.Join(dir, "fs", "a", "mnt")
	fatal(t, os.MkdirAll(point, 0o755))
	host := t.TempDir()
	precious := filepath.Join(host, "precious")
	fatal(t, os.WriteFile(precious, nil, 0o600))
	mountAt(t, host, point, "", unix.MS_BIND, "")

	fatal(t, s.Remove(t.Context(), "container"))
	for range 3 {
		fatal(t, s.Cleanup(t.Context()))
		if _, err := os.Stat(precious); err != nil {
			t.Fatalf("deleted through the mount: %v", err)
		}
	}
	if _, err := os.Stat(filepath.Join(point, "precious")); err != nil {
		t.Errorf("the directory was moved with the mount in it: %v", err)
	}
	if n := strings.Count(warnings(), point); n == 0 || strings.Count(warnings(), "level=warning") != 1 {
		t.Errorf("want one warning with the mount:\n%s", warnings())
	}
	fatal(t, unix.Unmount(point, 0))
	fatal(t, s.Cleanup(t.Context()))
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left after the unmount: %v", err)
	}
}

// TestForeignNames: only numbers and new-* are ours in snapshots/.
func TestForeignNames(t *testing.T) {
	root := t.TempDir()
	s := start(t, root)
	for _, name := range []string{"lost+found", ".snapshots", "notes", "007", "12", "new-123"} {
		fatal(t, os.MkdirAll(filepath.Join(s.root.Snapshots(), name, "content"), 0o755))
	}
	warnings := logged(t)
	fatal(t, s.Cleanup(t.Context()))
	fatal(t, s.Cleanup(t.Context()))
	if got := fmt.Sprint(names(t, s.root.Snapshots())); got != "[.snapshots 007 lost+found notes]" {
		t.Errorf("left %s", got)
	}
	if n := strings.Count(warnings(), "level=warning"); n != 4 {
		t.Errorf("%d warnings, want one for each name:\n%s", n, warnings())
	}
	stop(t, s)
	start(t, root)
}

// TestStuckDirectory: an orphan that cannot be moved is passed over, by Cleanup
// and by a start.
func TestStuckDirectory(t *testing.T) {
	for name, hold := range map[string]func(t *testing.T, dir string){
		"immutable": func(t *testing.T, dir string) {
			if out, err := exec.Command("chattr", "+i", dir).CombinedOutput(); err != nil {
				t.Skipf("chattr: %v: %s", err, out)
			}
			t.Cleanup(func() { _ = exec.Command("chattr", "-i", dir).Run() })
		},
		"mount point": func(t *testing.T, dir string) { mountAt(t, t.TempDir(), dir, "", unix.MS_BIND, "") },
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			s := start(t, root)
			for _, id := range []string{"71", "72", "73"} {
				fatal(t, os.MkdirAll(filepath.Join(s.root.Snapshots(), id, "fs"), 0o755))
			}
			hold(t, filepath.Join(s.root.Snapshots(), "72"))
			warnings := logged(t)
			stop(t, s)
			s = restart(t, root)
			fatal(t, s.Cleanup(t.Context()))
			if got := fmt.Sprint(names(t, s.root.Snapshots())); got != "[72]" {
				t.Errorf("left %s", got)
			}
			if !strings.Contains(warnings(), "snapshots/72") {
				t.Errorf("not in the log:\n%s", warnings())
			}
		})
	}
}

// TestSnapshotsMount: snapshots/ is a file system of its own, as is allowed.
// Everything works, what lies in the root's own removing/ goes, and lost+found
// stays.
func TestSnapshotsMount(t *testing.T) {
	for name, mount := range map[string]func(t *testing.T, dir string){
		"bind": func(t *testing.T, dir string) { mountAt(t, t.TempDir(), dir, "", unix.MS_BIND, "") },
		"ext4": func(t *testing.T, dir string) { treetest.LoopDisk(t, dir, 64<<20) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, 2)
			dir := filepath.Join(m.root, "snapshots")
			fatal(t, os.MkdirAll(filepath.Join(m.root, "removing", "old"), 0o700))
			fatal(t, os.MkdirAll(dir, 0o700))
			mount(t, dir)
			fatal(t, os.MkdirAll(filepath.Join(dir, "lost+found"), 0o700))
			s := m.boot(false)
			m.pull(s)
			fatal(t, os.Remove(filepath.Join(m.tree(s, 1), "link")))
			if _, err := s.layers.Repair(t.Context(), layers.RepairOptions{Apply: true}); err != nil {
				t.Fatal(err)
			}
			m.wantWhole(s)
			fatal(t, s.Remove(t.Context(), m.name(1)))
			fatal(t, s.Cleanup(t.Context()))
			stop(t, s)
			s = m.boot(false)
			fatal(t, s.Cleanup(t.Context()))
			if got := fmt.Sprint(names(t, dir)); got != "[2 healing lost+found removing replaced]" {
				t.Errorf("snapshots/ holds %s", got)
			}
			for _, area := range []string{filepath.Join(m.root, "removing"), s.root.Removing(), s.root.Healing(), s.root.Replaced()} {
				if got := names(t, area); len(got) > 0 {
					t.Errorf("%s holds %v", area, got)
				}
			}
			m.wantStates(s, "after all", "ready")
			stop(t, s)
		})
	}
}

// TestUnusableActive: the directory of one active snapshot is no directory any
// more, and its record cannot be written. The daemon starts; that snapshot is
// refused and can be removed, and others go on.
func TestUnusableActive(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, dir string){
		"missing": func(t *testing.T, dir string) { fatal(t, os.RemoveAll(dir)) },
		"file": func(t *testing.T, dir string) {
			fatal(t, errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600)))
		},
		"link": func(t *testing.T, dir string) {
			fatal(t, errors.Join(os.RemoveAll(dir), os.Symlink(t.TempDir(), dir)))
		},
		"tree missing": func(t *testing.T, dir string) { fatal(t, os.RemoveAll(filepath.Join(dir, "fs"))) },
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			s := start(t, root)
			for _, key := range []string{"spoiled", "good"} {
				_, err := s.Prepare(t.Context(), key, "")
				fatal(t, err)
			}
			dir := s.root.Dir(s.actives.Get("spoiled").ID)
			stop(t, s)
			spoil(t, dir)
			warnings := logged(t)
			s = restart(t, root)
			if name != "tree missing" && (!strings.Contains(warnings(), "key=spoiled") || !strings.Contains(warnings(), "cure=")) {
				t.Errorf("the log does not name the snapshot and the cure:\n%s", warnings())
			}
			if _, err := s.Mounts(t.Context(), "spoiled"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "remove the snapshot") {
				t.Errorf("mounts: %v", err)
			}
			if err := s.Commit(t.Context(), "spoiled-layer", "spoiled"); err == nil || name != "tree missing" && !errdefs.IsFailedPrecondition(err) {
				t.Errorf("commit: %v", err)
			}
			_, err := s.Mounts(t.Context(), "good")
			fatal(t, err)
			fatal(t, s.Commit(t.Context(), "layer", "good"))
			fatal(t, s.Remove(t.Context(), "spoiled"))
			fatal(t, s.Cleanup(t.Context()))
			if got := names(t, s.root.Snapshots()); len(got) != 1 {
				t.Errorf("snapshots/ holds %v", got)
			}
		})
	}
}

// TestUnwritableRecord: the record of one active snapshot must be set back and
// cannot be.
func TestUnwritableRecord(t *testing.T) {
	root := t.TempDir()
	s := start(t, root)
	for _, key := range []string{"spoiled", "good"} {
		_, err := s.Prepare(t.Context(), key, "")
		fatal(t, err)
	}
	dir := s.root.Dir(s.actives.Get("spoiled").ID)
	stop(t, s)
	fatal(t, errors.Join(os.Remove(filepath.Join(dir, layout.RecordFile)), os.Mkdir(filepath.Join(dir, layout.RecordFile+".new"), 0o700)))
	warnings := logged(t)
	s = restart(t, root)
	if !strings.Contains(warnings(), "key=spoiled") || !strings.Contains(warnings(), "cure=") {
		t.Errorf("the log does not name the snapshot and the cure:\n%s", warnings())
	}
	_, err := s.Mounts(t.Context(), "spoiled")
	fatal(t, err)
	fatal(t, s.Commit(t.Context(), "layer", "good"))
	fatal(t, s.Remove(t.Context(), "spoiled"))
	fatal(t, s.Cleanup(t.Context()))
}

// TestNameTakenAgain: a Commit takes a name between the transaction of its Remove
// and what follows it.
func TestNameTakenAgain(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	old := journalOf(t, s).Committed[0]
	fatal(t, s.Remove(t.Context(), old.Name))
	m.pull(s)
	if again := journalOf(t, s).Committed[0]; again.Name != old.Name || again.ID == old.ID {
		t.Fatalf("%+v after %+v", again, old)
	}
	s.layers.Drop(old.Name, old.ID) // the end of that Remove, late
	_, err := s.Stat(t.Context(), old.Name)
	fatal(t, err)
}

// TestTakenOver: an extraction of the built-in snapshotter that was half done
// when its root was taken over is never committed.
func TestTakenOver(t *testing.T) {
	m := newMachine(t, 1)
	key := "k8s.io/1/extract-1-x " + m.ChainIDs[0]
	builtin := builtIn(t, m.root)
	for _, k := range []string{key, "container"} {
		_, err := builtin.Prepare(t.Context(), k, "")
		fatal(t, err)
	}
	fatal(t, builtin.Close())
	for range 2 {
		s := m.boot(false)
		if err := s.Commit(t.Context(), m.name(0), key); !errdefs.IsFailedPrecondition(err) {
			t.Fatalf("a half extraction was committed: %v", err)
		}
		for _, e := range journalOf(t, s).Open {
			if e.Extraction != (e.Key == key) || !e.CursorLost {
				t.Errorf("%+v", e)
			}
		}
		stop(t, s)
	}
	s := m.boot(false)
	fatal(t, s.Commit(t.Context(), "of the container", "container"))
}

// TestEmptyStuck: content in empty/ that cannot be moved refuses the extractions
// that would show it, and nothing else.
func TestEmptyStuck(t *testing.T) {
	root := t.TempDir()
	s := start(t, root)
	stop(t, s)
	other := t.TempDir()
	fatal(t, os.WriteFile(filepath.Join(other, "file"), nil, 0o600))
	mountAt(t, other, s.root.Empty(), "", unix.MS_BIND, "")
	logged(t)
	s = start(t, root)
	rebase := snapshots.WithLabels(map[string]string{layout.LabelParentChainID: "sha256:" + strings.Repeat("0", 64)})
	if _, err := s.Prepare(t.Context(), "rebase", "", rebase); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), s.root.Empty()) {
		t.Errorf("got %v", err)
	}
	_, err := s.Prepare(t.Context(), "container", "")
	fatal(t, err)
}

package snapshotter

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/rebuild"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// TestForgottenPlace: the Commit after an Apply does not sync that the tree has its place. A start after the
// power went puts it there, whether the last daemon had stopped or not, and so does a rebuild. What had been written
// to the place, and deleted before the Commit, may be there again.
func TestForgottenPlace(t *testing.T) {
	throughApply = true
	defer func() { throughApply = false }()
	for name, c := range map[string]struct{ stopped, rebuilt, written bool }{
		"power cut": {}, "power cut after a stop": {stopped: true}, "rebuilt": {rebuilt: true}, "written to": {written: true},
	} {
		t.Run(name, func(t *testing.T) {
			root := layout.Root{Path: t.TempDir()}
			boot := func(id string) *Snapshotter {
				quiet(t)
				s, err := New(t.Context(), Config{Root: root.Path, BootID: id, NoBackground: true})
				fatal(t, err)
				t.Cleanup(func() { stop(t, s) })
				return s
			}
			s := boot("boot-1")
			e := extract(t, s, 1, false, dir("a", 0o755, 0), file("a/file")).mustCommit(t)
			e.wantStrategy(t, storage.StrategyApplied)
			if c.stopped {
				stop(t, s)
			} else {
				crash(t, s)
			}
			entry := entryOf(t, root.Path, e.name)
			forget(t, root, entry.ID)
			if c.written {
				fatal(t, os.WriteFile(filepath.Join(root.Tree(entry.ID), "written"), nil, 0o600))
			} else if r, err := verify.Layer(t.Context(), root.Path, entry, verify.Options{}); err == nil || !strings.Contains(err.Error(), "next start") {
				t.Errorf("before the start: %+v, %v", r, err)
			}
			if c.rebuilt {
				fatal(t, os.Remove(filepath.Join(root.Path, "metadata.db")))
				if r, err := rebuild.Database(t.Context(), root.Path); err != nil || r.Committed != 1 {
					t.Fatalf("%+v, %v", r, err)
				}
			}

			s = boot("boot-2")
			_, err := s.Stat(t.Context(), e.name)
			fatal(t, err)
			if r, err := verify.Layer(t.Context(), root.Path, entry, verify.Options{}); err != nil || r.State != storage.StateReady {
				t.Errorf("%+v, %v", r, err)
			}
			if _, err := os.Lstat(root.Applied(entry.ID)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is left: %v", root.Applied(entry.ID), err)
			}
			if _, err := os.Lstat(filepath.Join(root.Dir(entry.ID), "deleted/written")); c.written != (err == nil) {
				t.Errorf("what was in the place: %v", err)
			}
			if err := layout.PlaceAgain(root, entry.ID); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a second time: %v", err)
			}
		})
	}
}

// forget takes a tree back to where Apply has made it, as a file system does that went down before it wrote its
// journal.
func forget(t *testing.T, root layout.Root, id uint64) {
	t.Helper()
	fatal(t, os.Rename(root.Tree(id), root.Applied(id)))
	fatal(t, os.Mkdir(root.Tree(id), 0o755))
}

// entryOf is the entry of a committed name in the journal of a root that no daemon has.
func entryOf(t *testing.T, root, name string) (found storage.CommitEntry) {
	t.Helper()
	fatal(t, storage.ReadOnly(t.Context(), root, func(_ context.Context, j *storage.Journal) error {
		return j.EachCommitted(func(e storage.CommitEntry) error {
			if e.Name == name {
				found = e
			}
			return nil
		})
	}))
	return found
}

package replaced

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	cstorage "github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/gate"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mounts"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

func TestMain(m *testing.M) {
	log.L.Logger.SetOutput(io.Discard)
	os.Exit(m.Run())
}

// fixture is a root with a database: a layer and a container on it.
type fixture struct {
	*testing.T
	*Trees
	machine          mounts.Machine
	layer, container uint64                // numbers
	warnings         map[string]log.Fields // by key
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	root := layout.Root{Path: t.TempDir()}
	db, err := storage.Open(t.Context(), root.Path, storage.Options{})
	fatal(t, err)
	t.Cleanup(func() { fatal(t, db.Close()) })
	f := &fixture{T: t, machine: mounts.Machine{Complete: true}, warnings: map[string]log.Fields{}}
	g := gate.New(db, gate.Config{Root: root.Path, Dir: root.Path})
	f.Trees = New(root, g, "now", func(_ context.Context, key string, fields log.Fields, _ string) { f.warnings[key] = fields })
	f.MountDelay = 0
	f.ReadMounts = func() (mounts.Machine, error) { return f.machine, nil }
	fatal(t, os.Mkdir(root.Removing(), 0o700))
	f.update(func(ctx context.Context) error {
		if _, err := cstorage.CreateSnapshot(ctx, snapshots.KindActive, "extraction", ""); err != nil {
			return err
		}
		if err := storage.Commit(ctx, "extraction", "layer", snapshots.Usage{}); err != nil {
			return err
		}
		f.layer, _, _, err = storage.Info(ctx, "layer")
		return err
	})
	f.container = f.prepare("container")
	return f
}

func (f *fixture) update(fn func(context.Context) error) {
	f.Helper()
	fatal(f.T, f.gate.Update(f.Context(), nil, func(ctx context.Context, _ *storage.Journal) error { return fn(ctx) }))
}

func (f *fixture) prepare(key string) (id uint64) {
	f.Helper()
	f.update(func(ctx context.Context) error {
		_, err := cstorage.CreateSnapshot(ctx, snapshots.KindActive, key, "layer")
		if err == nil {
			id, _, _, err = storage.Info(ctx, key)
		}
		return err
	})
	return id
}

// keep has a heal put the tree of the layer aside.
func (f *fixture) keep() {
	f.Helper()
	dir := f.root.HealingPlace(f.layer, "now")
	fatal(f.T, os.MkdirAll(filepath.Join(dir, "fs"), 0o700))
	fatal(f.T, f.Keep(f.Context(), dir))
}

// swept sweeps, and fails unless the tree is kept or not.
func (f *fixture) swept(when string, kept bool) {
	f.Helper()
	f.Sweep(f.Context())
	if left := names(f.T, f.root.Replaced()); (len(left) == 1) != kept {
		f.Errorf("%s: replaced/ holds %q", when, left)
	}
	if moved := names(f.T, f.root.Removing()); (len(moved) == 1) == kept {
		f.Errorf("%s: removing/ holds %q", when, moved)
	}
}

// overlay is the mount of a container on the layer.
func (f *fixture) overlay(container uint64, minor uint32) mounts.Mount {
	return mounts.Mount{
		Device: mounts.Device{Minor: minor}, Type: "overlay",
		Options: fmt.Sprintf("rw,lowerdir=/r/snapshots/%d/fs,upperdir=/r/snapshots/%d/fs", f.layer, container),
	}
}

// TestSweepMounted: a mount that was there when the tree was replaced keeps it, in
// another process of this boot too, and a mount of a later container does not.
func TestSweepMounted(t *testing.T) {
	f := newFixture(t)
	f.keep()
	f.machine.Mounts = []mounts.Mount{f.overlay(f.container, 50), f.overlay(f.prepare("later"), 51)}
	f.swept("mounted, and a later one too", true)
	f.found.Clear() // as in another process
	f.swept("after a restart", true)
	f.machine.Mounts = f.machine.Mounts[1:]
	f.swept("only the later one is mounted", false)
	f.Delete(t.Context())
	if left := names(t, f.root.Removing()); len(left) > 0 || len(f.warnings) > 0 {
		t.Errorf("removing/ holds %q; warnings %v", left, f.warnings)
	}
}

// TestSweepUndecided: what cannot be decided keeps the tree.
func TestSweepUndecided(t *testing.T) {
	for name, c := range map[string]struct {
		set, unset func(*fixture)
		warning    string // the beginning of its key
	}{
		"too early": {
			func(f *fixture) { f.MountDelay = time.Hour },
			func(f *fixture) { f.MountDelay = 0 }, "",
		},
		"mounts cannot be read": {
			func(f *fixture) {
				f.ReadMounts = func() (mounts.Machine, error) { return mounts.Machine{Complete: true}, errors.New("as if") }
			},
			func(f *fixture) { f.ReadMounts = func() (mounts.Machine, error) { return f.machine, nil } }, "machine",
		},
		"files of a detached mount are in use": {
			func(f *fixture) { f.machine.Detached = []mounts.Device{{Minor: 60}} },
			func(f *fixture) { f.machine.Detached = nil }, "",
		},
		"a bind mount of the tree": {
			func(f *fixture) {
				f.machine.Mounts = []mounts.Mount{{Root: "/r/replaced/" + names(f.T, f.root.Replaced())[0] + "/fs", Point: "/mnt"}}
			},
			func(f *fixture) { f.machine.Mounts = nil }, "",
		},
		"mounts of others are not visible": {
			func(f *fixture) { f.machine.Complete = false },
			func(f *fixture) {
				f.update(func(ctx context.Context) error { return storage.Remove(ctx, "container") })
			}, "",
		},
		"the users cannot be written": {
			func(f *fixture) {
				fatal(f.T, os.Remove(f.usersOf()))
				fatal(f.T, os.Mkdir(f.usersOf(), 0o700))
			},
			func(f *fixture) { fatal(f.T, os.Remove(f.usersOf())) }, "users ",
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.keep()
			c.set(f)
			f.swept("undecided", true)
			warned := slices.Collect(maps.Keys(f.warnings))
			if c.warning == "" && len(warned) > 0 || c.warning != "" && (len(warned) != 1 || !strings.HasPrefix(warned[0], c.warning)) {
				t.Errorf("warnings %q, want %q", warned, c.warning)
			}
			c.unset(f)
			f.swept("decided", false)
		})
	}
}

func (f *fixture) usersOf() string {
	return filepath.Join(f.root.Replaced(), names(f.T, f.root.Replaced())[0], usersFile)
}

// TestKeepNothing: a heal of a layer whose directory was gone leaves nothing to keep,
// and one whose directory was a file nothing that a mount can use.
func TestKeepNothing(t *testing.T) {
	f := newFixture(t)
	dir := f.root.HealingPlace(1, "now")
	fatal(t, f.Keep(t.Context(), dir))
	fatal(t, os.Mkdir(f.root.Healing(), 0o700))
	fatal(t, os.WriteFile(dir, nil, 0o600))
	fatal(t, f.Keep(t.Context(), dir))
	if left := names(t, f.root.Healing()); len(left) > 0 {
		t.Errorf("healing/ holds %q", left)
	}
	if _, err := os.Lstat(f.root.Replaced()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("replaced/: %v", err)
	}
	if moved := names(t, f.root.Removing()); len(moved) != 1 {
		t.Errorf("removing/ holds %q", moved)
	}
}

// TestSettle: trees of this boot, and of an unknown one, are kept; those of another
// boot are deleted.
func TestSettle(t *testing.T) {
	f := newFixture(t)
	for _, name := range []string{"healing/1", "healing/1.now", "healing/1.before", "replaced/1.now.x", "replaced/1.before.x"} {
		fatal(t, os.MkdirAll(filepath.Join(f.root.Path, name, "fs"), 0o700))
	}
	f.Settle(t.Context())
	if left := names(t, f.root.Healing()); len(left) > 0 {
		t.Errorf("healing/ holds %q", left)
	}
	kept := names(t, f.root.Replaced())
	if len(kept) != 3 || slices.ContainsFunc(kept, func(name string) bool { return layout.BootOf(name, true) != "now" }) {
		t.Errorf("replaced/ holds %q", kept)
	}
	if moved := names(t, f.root.Removing()); len(moved) != 2 || len(f.warnings) > 0 {
		t.Errorf("removing/ holds %q; warnings %v", moved, f.warnings)
	}
}

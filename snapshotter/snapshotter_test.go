package snapshotter

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/rebuild"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

func start(t *testing.T, root string) *Snapshotter {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("overlay mounts need root")
	}
	quiet(t)
	s, err := New(t.Context(), Config{Root: root, JournalHistory: 10})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, s) })
	return s
}

// builtIn is containerd's own overlay snapshotter on a root.
func builtIn(t *testing.T, root string) snapshots.Snapshotter {
	t.Helper()
	s, err := overlay.NewSnapshotter(root)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func stop(t *testing.T, s *Snapshotter) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// addLayer prepares, fills and commits a layer of one file.
func addLayer(t *testing.T, s snapshots.Snapshotter, name, parent string) {
	t.Helper()
	mounts, err := s.Prepare(t.Context(), name+"-key", parent)
	if err != nil {
		t.Fatal(err)
	}
	dir := mounts[0].Source
	for _, o := range mounts[0].Options {
		if upper, ok := strings.CutPrefix(o, "upperdir="); ok {
			dir = upper
		}
	}
	if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), name, name+"-key"); err != nil {
		t.Fatal(err)
	}
}

func journalOf(t *testing.T, s *Snapshotter) JournalReport {
	t.Helper()
	r, err := s.Inspect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return r.Journal
}

// TestForeignRows: the built-in snapshotter has used our root for a while. Its
// rows have no journal entries; that must not keep the daemon from starting.
func TestForeignRows(t *testing.T) {
	root := t.TempDir()
	s := start(t, root)
	addLayer(t, s, "ours", "")
	stop(t, s)

	builtin, err := overlay.NewSnapshotter(root)
	if err != nil {
		t.Fatal(err)
	}
	addLayer(t, builtin, "theirs", "ours")
	if _, err := builtin.Prepare(t.Context(), "container", "theirs"); err != nil {
		t.Fatal(err)
	}
	if err := builtin.Close(); err != nil {
		t.Fatal(err)
	}

	s = start(t, root)
	j := journalOf(t, s)
	if len(j.Committed) != 2 || len(j.Open) != 1 {
		t.Fatalf("journal %+v", j)
	}
	for _, e := range j.Committed {
		want := map[string]storage.Strategy{"ours": storage.StrategySyncfs, "theirs": storage.StrategyUnknown}[e.Name]
		if e.Strategy != want {
			t.Errorf("%s: strategy %q, want %q", e.Name, e.Strategy, want)
		}
	}
	if err := s.Commit(t.Context(), "committed-container", "container"); err != nil {
		t.Error(err)
	}
}

// TestWalkHoldsNoTransaction: a visitor may write, and a slow one keeps nobody
// from writing. bbolt would dead-lock on both as soon as the file grows.
func TestWalkHoldsNoTransaction(t *testing.T) {
	s := start(t, t.TempDir())
	addLayer(t, s, "base", "")
	done := make(chan error, 1)
	go func() {
		done <- s.Walk(context.WithoutCancel(t.Context()), func(ctx context.Context, info snapshots.Info) error {
			// A file that grows is mapped anew, when every transaction has ended.
			return s.gate.Update(ctx, nil, func(_ context.Context, j *storage.Journal) error {
				return j.PutRun(storage.Run{Brake: strings.Repeat("x", 1<<20)})
			})
		})
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the visitor waits for the walk's own transaction")
	}
}

// TestRebuildTakesTheNewer: a removed snapshot whose directory was not yet
// deleted claims a name that is in use again.
func TestRebuildTakesTheNewer(t *testing.T) {
	root := t.TempDir()
	s := start(t, root)
	for range 2 {
		addLayer(t, s, "base", "")
		if _, err := s.Prepare(t.Context(), "container", "base"); err != nil {
			t.Fatal(err)
		}
		for _, key := range []string{"container", "base"} {
			if err := s.Remove(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
	}
	addLayer(t, s, "base", "")
	newest := journalOf(t, s).Committed[0].ID
	stop(t, s)
	if err := os.Remove(filepath.Join(root, storage.FileName)); err != nil {
		t.Fatal(err)
	}
	r, err := rebuild.Database(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	// One "container" comes back: it was removed, but its directory still said
	// otherwise, and containerd will remove it again.
	if r.Committed != 1 || r.Active != 1 || len(r.SetAside) != 3 {
		t.Fatalf("%+v", r)
	}
	s = start(t, root)
	if e := journalOf(t, s).Committed[0]; e.ID != newest || e.Strategy != storage.StrategyRebuilt {
		t.Errorf("restored %+v, want the newest, id %d", e, newest)
	}
	if _, err := rebuild.Database(t.Context(), root); !errors.Is(err, storage.ErrLocked) {
		t.Errorf("rebuilt below a running daemon: %v", err)
	}
}

// TestRemoveOfNothing: see Remove.
func TestRemoveOfNothing(t *testing.T) {
	s := start(t, t.TempDir())
	if err := s.Remove(t.Context(), "never-was"); err != nil {
		t.Error(err)
	}
	if _, err := s.Stat(t.Context(), "never-was"); !errdefs.IsNotFound(err) {
		t.Errorf("got %v", err)
	}
}

// TestFailedStart: a start that fails leaves nothing open behind it.
func TestFailedStart(t *testing.T) {
	root := t.TempDir()
	s := start(t, root)
	if _, err := s.Prepare(t.Context(), "container", ""); err != nil {
		t.Fatal(err)
	}
	stop(t, s)
	// A link is followed to a container's directory, and then not to snapshots/
	// itself, which nothing can be synced by.
	elsewhere := filepath.Join(root, "elsewhere")
	if err := errors.Join(os.Rename(s.root.Snapshots(), elsewhere), os.Symlink(elsewhere, s.root.Snapshots())); err != nil {
		t.Fatal(err)
	}
	if s, err := New(t.Context(), Config{Root: root}); err == nil {
		stop(t, s)
		t.Fatal("started with a link in the place of snapshots/")
	}
	fds, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && strings.HasPrefix(target, root) {
			t.Errorf("%s is still open", target)
		}
	}
}

package gate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	cstorage "github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	clog "github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

func TestMain(m *testing.M) {
	clog.L.Logger.SetOutput(io.Discard)
	os.Exit(m.Run())
}

// A write that failed, on whatever file, is final for all that was being written: the
// layer can never be committed. The file system takes writes, though, as the probe has
// proven, and the next layer can.
func ExampleGate_Do() {
	root, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(root)
	ctx := context.Background()
	db, err := storage.Open(ctx, root, storage.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()
	g := New(db, Config{Root: root, Dir: root})
	row := func(context.Context, *storage.Journal) error { return nil }

	layer, err := g.OpenWriter(root, 1)
	if err != nil {
		log.Fatal(err)
	}
	defer layer.Close()
	fmt.Println(g.Do(ctx, func() error { return &fsync.Error{Op: "fsync", Path: "record", Err: unix.EIO} }))
	fmt.Println(g.Commit(ctx, layer, nil, row))

	next, err := g.OpenWriter(root, 2)
	if err != nil {
		log.Fatal(err)
	}
	defer next.Close()
	fmt.Println(g.Open(ctx), g.Commit(ctx, next, nil, row))
	// Output:
	// fsync record: input/output error
	// fsync record: input/output error; extract again: failed precondition
	// <nil> <nil>
}

func open(t *testing.T, health func(error)) *Gate {
	t.Helper()
	root := t.TempDir()
	db, err := storage.Open(t.Context(), root, storage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return New(db, Config{Root: root, Dir: root, OnHealth: health})
}

func (g *Gate) writer(t *testing.T, id uint64) *Writer {
	t.Helper()
	w, err := g.OpenWriter(g.cfg.Dir, id)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	return w
}

var errDisk = &fsync.Error{Op: "syncfs", Path: "disk", Err: unix.EIO}

// TestPoisonOnRecord: the journal has what a failed write means for a snapshot that is
// active, and nothing of one that was closed before.
func TestPoisonOnRecord(t *testing.T) {
	g := open(t, nil)
	var ids [2]uint64
	if err := g.Update(t.Context(), nil, func(ctx context.Context, j *storage.Journal) error {
		for i, key := range []string{"one", "two"} {
			if _, err := cstorage.CreateSnapshot(ctx, snapshots.KindActive, key, ""); err != nil {
				return err
			}
			id, _, _, err := storage.Info(ctx, key)
			if ids[i] = id; err != nil {
				return err
			}
			if err := j.PutOpen(storage.OpenEntry{ID: id, Key: key}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	open, closed := g.writer(t, ids[0]), g.writer(t, ids[1])
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	if err := g.Do(t.Context(), func() error { return errDisk }); !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
	if !errdefs.IsFailedPrecondition(open.Poisoned()) || closed.Poisoned() != nil {
		t.Errorf("open: %v; closed: %v", open.Poisoned(), closed.Poisoned())
	}
	if err := g.View(t.Context(), func(_ context.Context, j *storage.Journal) error {
		for i, want := range []string{errDisk.Error(), ""} {
			if e, err := j.GetOpen(ids[i]); err != nil || e.Poisoned != want {
				t.Errorf("journal entry %d: %+v, %v", i, e, err)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// TestDoInsideDo: a failure is dealt with once, also when a write is made of others.
func TestDoInsideDo(t *testing.T) {
	g := open(t, nil)
	if err := g.Do(t.Context(), func() error {
		inner := g.Do(t.Context(), func() error { return errDisk })
		g.writer(t, 1) // what begins after the failure has nothing to do with it
		return fmt.Errorf("outer: %w", inner)
	}); !IsWriteFailure(err) {
		t.Error(err)
	}
	for w := range g.writers.open {
		if err := w.Poisoned(); err != nil {
			t.Error(err)
		}
	}
}

// TestOtherErrors: an error that is not of a write concerns its own operation only.
func TestOtherErrors(t *testing.T) {
	g := open(t, func(err error) { t.Errorf("health: %v", err) })
	w := g.writer(t, 1)
	forgotten := false
	err := g.Update(t.Context(), &Undo{Key: "key", ID: 1, Forget: func() { forgotten = true }}, func(context.Context, *storage.Journal) error {
		return errdefs.ErrNotFound
	})
	if !errdefs.IsNotFound(err) || !forgotten || w.Poisoned() != nil {
		t.Errorf("%v, forgotten %v, poisoned %v", err, forgotten, w.Poisoned())
	}
}

// TestPoisonedWhileWaiting: a write that fails between the sync of a Commit and its
// transaction poisons it, because the failure may be about what it has synced.
func TestPoisonedWhileWaiting(t *testing.T) {
	g := open(t, nil)
	w := g.writer(t, 1)
	err := g.Synced(t.Context(), w, func(ctx context.Context) error {
		_ = g.Do(ctx, func() error { return errDisk })
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Commit(t.Context(), w, nil, func(context.Context, *storage.Journal) error {
		t.Error("the transaction runs")
		return nil
	}); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
}

// TestSyncApart: a sync outside of the lock of Commits has succeeded when every sync beside
// it has ended, for its failure may be about the same pages.
func TestSyncApart(t *testing.T) {
	g := open(t, nil)
	w, other := g.writer(t, 1), g.writer(t, 2)
	inside, fail, synced := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		_ = g.Synced(t.Context(), other, func(ctx context.Context) error {
			close(inside)
			<-fail
			return g.Do(ctx, func() error { return errDisk })
		})
	}()
	<-inside
	go func() { synced <- g.SyncApart(t.Context(), w, nil) }()
	select {
	case err := <-synced:
		t.Fatalf("it did not wait: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	close(fail)
	if err := <-synced; !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	row := func(context.Context, *storage.Journal) error { t.Error("the transaction runs"); return nil }
	if err := g.CommitRest(t.Context(), w, nil, func() error { return nil }, row); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	next := g.writer(t, 3)
	if err := g.SyncApart(t.Context(), next, nil); err != nil {
		t.Error(err)
	}
	if err := g.CommitRest(t.Context(), next, nil, func() error { return errDisk }, row); !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.SyncApart(canceled, g.writer(t, 4), nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestSyncAhead: a sync is begun, and what it fails over is final. It is left out while another one is
// under way, and where files are synced alone.
func TestSyncAhead(t *testing.T) {
	g := open(t, nil)
	w := g.broken(t)
	g.apart <- struct{}{} // the sync of another layer
	g.SyncAhead(t.Context(), w, nil)
	<-g.apart
	g.cfg.Sync = fsync.OwnFiles
	files := fsync.NewFiles(g.cfg.Dir)
	defer files.Close()
	g.SyncAhead(t.Context(), w, files)
	g.apart <- struct{}{} // waits for one that was begun
	if err := w.Poisoned(); err != nil {
		t.Fatalf("a sync was begun: %v", err)
	}
	<-g.apart
	g.SyncAhead(t.Context(), w, nil)
	g.apart <- struct{}{}
	if err := w.Poisoned(); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("its failure is not final: %v", err)
	}
	<-g.apart
	if err := g.SyncApart(t.Context(), w, nil); !errors.Is(err, unix.EBADF) {
		t.Errorf("SyncApart: %v", err)
	}
}

// TestGrown: a sync is begun when another program has written much since the last one, or something
// before a Commit, and while others do not have much more to be written.
func TestGrown(t *testing.T) {
	for _, c := range []struct {
		name  string
		grow  func(*Gate, *Writer)
		begun bool
	}{
		{"not much", func(g *Gate, w *Writer) { g.Grown(t.Context(), w, much-1) }, false},
		{"much, bit by bit", func(g *Gate, w *Writer) { g.Grown(t.Context(), w, much-1); g.Grown(t.Context(), w, 1) }, true},
		{"little before a Commit", func(g *Gate, w *Writer) {
			g.Grown(t.Context(), w, enough-1)
			g.CommitAhead(t.Context(), w)
		}, false},
		{"enough before a Commit", func(g *Gate, w *Writer) {
			g.Grown(t.Context(), w, enough)
			g.CommitAhead(t.Context(), w)
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			for range 10 { // others may have much to be written just then
				g := open(t, nil)
				w := g.broken(t)
				c.grow(g, w)
				g.apart <- struct{}{} // waits for one that was begun
				begun := w.Poisoned() != nil
				if begun && !c.begun {
					t.Fatal("a sync was begun")
				}
				if begun == c.begun {
					return
				}
				unix.Sync()
			}
			t.Error("no sync was begun")
		})
	}
	t.Run("beside others", func(t *testing.T) {
		dir := t.TempDir()
		for range 10 { // another process may have everything written just then
			g := open(t, nil)
			w := g.writer(t, 1)
			if err := os.WriteFile(dir+"/other", make([]byte, 256<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			g.Grown(t.Context(), w, much)
			if w.grown.Load() == much {
				return
			}
		}
		t.Error("a sync was begun beside 256 MiB of another program")
	})
}

// broken is a Writer whose syncs fail.
func (g *Gate) broken(t *testing.T) *Writer {
	t.Helper()
	before := descriptors(t, g.cfg.Dir)
	w := g.writer(t, 1)
	for fd := range descriptors(t, g.cfg.Dir) {
		if !before[fd] {
			breakSync(t, fd)
		}
	}
	return w
}

// descriptors are those of a path that the process has.
func descriptors(t *testing.T, path string) map[int]bool {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	all := map[int]bool{}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		if open, _ := os.Readlink("/proc/self/fd/" + e.Name()); open == path { // that of this list is closed
			all[fd] = true
		}
	}
	return all
}

// breakSync makes syncfs(2) of a descriptor fail, with EBADF.
func breakSync(t *testing.T, fd int) {
	t.Helper()
	path, err := unix.Open(t.TempDir(), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err == nil {
		err = errors.Join(unix.Dup3(path, fd, unix.O_CLOEXEC), unix.Close(path))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestCanceledAfterSync: a caller that has given up while it waited commits nothing.
func TestCanceledAfterSync(t *testing.T) {
	g := open(t, nil)
	w := g.writer(t, 1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.Commit(ctx, w, nil, func(context.Context, *storage.Journal) error {
		t.Error("the transaction runs")
		return nil
	}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := g.Commit(t.Context(), w, nil, func(context.Context, *storage.Journal) error { return nil }); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

// TestPoisonIsNoNewFailure: the refusal of what an earlier failure has poisoned, inside a
// transaction, is not another failed write. A Writer that was opened in between stays.
func TestPoisonIsNoNewFailure(t *testing.T) {
	g := open(t, nil)
	old := g.writer(t, 1)
	if err := g.Do(t.Context(), func() error { return errDisk }); !errors.Is(err, unix.EIO) {
		t.Fatal(err)
	}
	next := g.writer(t, 2)
	if err := g.Update(t.Context(), nil, func(context.Context, *storage.Journal) error { return old.Poisoned() }); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	if err := next.Poisoned(); err != nil {
		t.Error(err)
	}
}

// TestSyncApartEnds: a caller that is canceled does not wait for the sync of another layer.
func TestSyncApartEnds(t *testing.T) {
	g := &Gate{apart: make(chan struct{}, 1)}
	g.apart <- struct{}{} // the sync of another layer
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.SyncApart(ctx, nil, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

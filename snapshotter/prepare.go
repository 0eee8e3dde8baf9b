package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/active"
	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/internal/gate"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/writeback"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Prepare makes an active snapshot on a committed parent that is whole (see
// Stat), or on none. When it returns, its directories and its row are on disk.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, key, parent, opts, s.overlay.Prepare)
}

// View makes a read-only snapshot of such a parent. When it returns, its
// directory and its row are on disk.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, key, parent, opts, s.overlay.View)
}

type createFunc func(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error)

func (s *Snapshotter) create(ctx context.Context, key, parent string, opts []snapshots.Opt, create createFunc) (_ []mount.Mount, err error) {
	if err := layout.CheckName("key", key); err != nil {
		return nil, err
	}
	if parent != "" {
		if err := layout.CheckName("parent", parent); err != nil {
			return nil, err
		}
	}
	if _, err := applied(opts); err != nil {
		return nil, err
	}
	if err := s.gate.Open(ctx); err != nil {
		return nil, err
	}
	if parent != "" {
		if err := s.parentWhole(ctx, parent); err != nil {
			return nil, fmt.Errorf("prepare %q: %w", key, err)
		}
	}
	unlock, err := s.keys.Lock(ctx, key)
	if err != nil {
		return nil, err
	}
	defer unlock()

	// One at a time until its clean-up is over: when containerd's Prepare fails
	// it removes the directory of its number after its transaction, and the
	// next one gets the same number.
	s.creating.Lock()
	defer s.creating.Unlock()

	var (
		a    *active.Snapshot
		info snapshots.Info
	)
	undo := gate.Undo{Key: key}
	// Another process may have removed it; nothing could be prepared ever after.
	if err := s.gate.Do(ctx, func() error { return fsync.MkdirAll(s.root.Snapshots(), 0o700) }); err != nil {
		return nil, err
	}
	inTx := storage.BeforeCommit(ctx, func(ctx context.Context, j *storage.Journal) (err error) {
		if undo.ID, info, _, err = storage.Info(ctx, key); err != nil {
			return err
		}
		if err := checkRebase(info); err != nil {
			return err
		}
		if isRebase(info) && s.emptyBad != nil {
			return fmt.Errorf("parallel unpack: %w: %w", s.emptyBad, errdefs.ErrFailedPrecondition)
		}
		faults.Point(faults.PrepareRenamed)
		if a, err = s.makeDurable(undo.ID, info); err != nil || a == nil {
			return err
		}
		return j.PutOpen(s.openEntry(a, key, info))
	})
	var mounts []mount.Mount
	if err := s.gate.DoUndo(ctx, &undo, func() (err error) {
		mounts, err = create(inTx, key, parent, opts...)
		return err
	}); err != nil {
		if a != nil {
			err = errors.Join(err, a.Writer.Close())
		}
		return nil, fmt.Errorf("prepare %q: %w", key, err)
	}
	if a != nil {
		s.follow(a)
		s.actives.Add(key, a)
	}
	faults.Point(faults.PrepareDone)
	return s.adapt(mounts, undo.ID, info), nil
}

// follow has an extraction written as it comes, until its Commit, its removal, or an Apply. creating must be held.
func (s *Snapshotter) follow(a *active.Snapshot) {
	if !a.Extraction || s.cfg.NoBackground || s.background.Err() != nil {
		return
	}
	var ctx context.Context
	ctx, a.Unfollow = context.WithCancel(s.background)
	s.running.Go(func() {
		writeback.Follow(ctx, s.root.Tree(a.ID), func(bytes int64) { s.gate.Grown(ctx, a.Writer, bytes) })
	})
}

// promptly bounds the wait of a Prepare or a View for its parent. containerd holds
// its lock of the snapshotter meanwhile (core/metadata/snapshot.go:298): a collection
// waits for that lock, and everything in every namespace waits for the collection.
const promptly = time.Second

// parentWhole lets a Prepare wait, promptly, until its parent is whole. Verifying and
// healing go on after that. What is no committed snapshot is left to containerd's
// snapshotter, and its errors.
func (s *Snapshotter) parentWhole(ctx context.Context, parent string) error {
	var info snapshots.Info
	err := s.gate.View(ctx, func(ctx context.Context, _ *storage.Journal) (err error) {
		_, info, _, err = storage.Info(ctx, parent)
		return err
	})
	if err != nil || info.Kind != snapshots.KindCommitted {
		return nil
	}
	ctx, stop := context.WithTimeout(ctx, promptly)
	defer stop()
	return s.layers.Wait(ctx, parent, false)
}

// makeDurable puts a new snapshot directory on disk, before its row is. An
// active snapshot gets its cursor, before a client can have written to it.
//
// The row must not be durable without the directory: after a power cut, a
// container would find its root gone. bbolt's fdatasync does not bring the
// rename to disk with it; measured on ext4 and xfs.
func (s *Snapshotter) makeDurable(id uint64, info snapshots.Info) (a *active.Snapshot, err error) {
	dir := s.root.Dir(id)
	if info.Kind == snapshots.KindActive {
		writer, err := s.gate.OpenWriter(dir, id)
		if err != nil {
			return nil, err
		}
		_, extraction := layout.ExtractionOf(info.Name, info.Labels)
		a = &active.Snapshot{ID: id, Extraction: extraction, Writer: writer}
		defer func() {
			if err != nil {
				err = errors.Join(err, writer.Close())
				a = nil
			}
		}()
	}
	if err := layout.WriteRecord(dir, layout.RecordOf(id, info)); err != nil {
		return a, err
	}
	faults.Point(faults.PrepareRecorded)
	paths := []string{filepath.Join(dir, "fs")}
	if info.Kind == snapshots.KindActive {
		paths = append(paths, filepath.Join(dir, "work"))
	}
	for _, path := range append(paths, dir, s.root.Snapshots()) {
		if err := fsync.Dir(path); err != nil {
			return a, err
		}
	}
	faults.Point(faults.PrepareSynced)
	return a, nil
}

func (s *Snapshotter) openEntry(a *active.Snapshot, key string, info snapshots.Info) storage.OpenEntry {
	chainID, _ := layout.ExtractionOf(key, info.Labels)
	return storage.OpenEntry{
		ID: a.ID, Key: key, Extraction: a.Extraction, ChainID: chainID, Parent: info.Parent,
		Started: time.Now().UTC(), BootID: s.bootID, RunID: s.runID, CursorLost: a.Lost,
	}
}

package snapshotter

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Remove drops the row of an active snapshot, a view, or a committed snapshot
// without children. Its directory goes with the next Cleanup, or at once with
// Config.SyncRemove.
//
// A key that does not exist is no error: containerd's garbage collector asks
// again for what it did not hear the answer to, and one NotFound ends its whole
// sweep (core/metadata/snapshot.go:992).
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	if err := checkName("key", key); err != nil {
		return err
	}
	if err := s.writable(ctx); err != nil {
		return err
	}
	unlock, err := s.lockKey(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()

	var id uint64
	err = s.db.View(ctx, func(ctx context.Context, _ *storage.Journal) (err error) {
		id, _, _, err = storage.Info(ctx, key)
		return err
	})
	if errdefs.IsNotFound(err) {
		s.forget(key) // of a row that was taken back
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove %q: %w", key, err)
	}
	if faults.Mutant("remove-deletes-first") {
		_ = os.RemoveAll(s.dir(id))
	}
	inTx := storage.BeforeCommit(ctx, func(ctx context.Context, j *storage.Journal) error {
		defer faults.Point(faults.RemoveInTx)
		return j.Remove(id, time.Now().UTC())
	})
	if err := s.overlay.Remove(inTx, key); err != nil {
		if isWriteFailure(err) {
			s.onWriteFailure(ctx, err, undo{})
		}
		return fmt.Errorf("remove %q: %w", key, err)
	}
	faults.Point(faults.RemoveDone)
	s.forget(key)
	s.ready.drop(key)
	if s.cfg.SyncRemove {
		return s.Cleanup(ctx)
	}
	return nil
}

// Update changes the labels of a snapshot.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	if err := checkName("name", info.Name); err != nil {
		return snapshots.Info{}, err
	}
	if err := s.writable(ctx); err != nil {
		return snapshots.Info{}, err
	}
	unlock, err := s.lockKey(ctx, info.Name)
	if err != nil {
		return snapshots.Info{}, err
	}
	defer unlock()
	info.Labels = withoutState(info.Labels)
	inTx := storage.BeforeCommit(ctx, func(ctx context.Context, _ *storage.Journal) error {
		defer faults.Point(faults.SnapshotUpdate)
		id, updated, _, err := storage.Info(ctx, info.Name)
		if err != nil {
			return err
		}
		return s.updateRecord(id, updated)
	})
	updated, err := s.overlay.Update(inTx, info, fieldpaths...)
	if err != nil && isWriteFailure(err) {
		s.onWriteFailure(ctx, err, undo{})
	}
	return updated, err
}

// updateRecord carries new labels into a snapshot's record. A snapshot whose
// directory is damaged can still get labels.
func (s *Snapshotter) updateRecord(id uint64, info snapshots.Info) error {
	r, err := readRecord(s.dir(id))
	if err != nil {
		return nil
	}
	r.Labels, r.Updated = info.Labels, info.Updated
	return replaceRecord(s.dir(id), r, true)
}

// Cleanup deletes every directory that has no row, and returns when they are
// gone. Other calls go on meanwhile.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	if err := s.writable(ctx); err != nil {
		return err
	}
	if _, err := s.setAside(ctx); err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	faults.Point(faults.SweepDeleting)
	s.deleteRemoving(ctx)
	return nil
}

// setAside moves directories without a row from snapshots/ to removing/, where
// their numbers are in nobody's way, and returns how many.
//
// The lock keeps Prepare out, whose directory exists before its row; the rows
// it reads are durable, because nobody gets here after a failed transaction. So
// no directory that a row speaks of can be moved (I5).
func (s *Snapshotter) setAside(ctx context.Context) (int, error) {
	s.creating.Lock()
	defer s.creating.Unlock()
	var keys map[uint64]string
	if err := s.db.View(ctx, func(ctx context.Context, _ *storage.Journal) (err error) {
		keys, err = storage.Keys(ctx)
		return err
	}); err != nil {
		return 0, err
	}
	entries, err := os.ReadDir(s.snapshotsDir())
	if err != nil {
		return 0, err
	}
	moved := 0
	for _, e := range entries {
		if id, err := strconv.ParseUint(e.Name(), 10, 64); err == nil {
			if _, ok := keys[id]; ok {
				continue
			}
		}
		aside := filepath.Join(s.removingDir(), fmt.Sprintf("%s.%s.%d", e.Name(), s.runID, time.Now().UnixNano()))
		if err := os.Rename(filepath.Join(s.snapshotsDir(), e.Name()), aside); err != nil {
			return moved, err
		}
		moved++
		log.G(ctx).WithField("directory", e.Name()).Debug("directory without a row set aside for deletion")
		faults.Point(faults.SweepSetAside)
	}
	return moved, nil
}

// deleteRemoving deletes what lies in removing/, tree by tree, until ctx ends.
// A tree that cannot be deleted stays for the next time.
func (s *Snapshotter) deleteRemoving(ctx context.Context) {
	s.deleting.Lock()
	defer s.deleting.Unlock()
	entries, err := os.ReadDir(s.removingDir())
	if err != nil {
		log.G(ctx).WithError(err).Warn("directories without a row were not deleted")
		return
	}
	for _, e := range entries {
		if ctx.Err() != nil {
			return
		}
		if err := os.RemoveAll(filepath.Join(s.removingDir(), e.Name())); err != nil {
			log.G(ctx).WithError(err).Warn("directory without a row was not deleted")
		}
		faults.Point(faults.SweepDeleted)
	}
}

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Commit turns the active snapshot key into the committed snapshot name. When
// it returns nil, the layer and the record of it are on disk (I1).
//
// Errors are those of containerd's snapshotters: AlreadyExists for a name that
// is taken, NotFound for a key or a parent that does not exist,
// FailedPrecondition for a view. FailedPrecondition also means that the
// snapshot can never be committed: a write failed while it was active, or it is
// an extraction that an earlier daemon began. Its layer must be extracted
// again, under a new key.
//
// A Commit whose context ends either happened or did not; it is not undone
// after its transaction has begun.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) (err error) {
	if err := errors.Join(checkName("name", name), checkName("key", key)); err != nil {
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
	if err := s.commit(ctx, name, key, opts); err != nil {
		return fmt.Errorf("commit %q as %q: %w", key, name, err)
	}
	faults.Point(faults.CommitDone)
	return nil
}

func (s *Snapshotter) commit(ctx context.Context, name, key string, opts []snapshots.Opt) (err error) {
	a, info, err := s.committable(ctx, name, key)
	if err != nil {
		return err
	}
	committed, err := committedInfo(name, info, opts)
	if err != nil {
		return err
	}
	dir := s.dir(a.id)
	t, err := s.truthOf(ctx, a, info, committed.Parent)
	if err != nil {
		return err
	}
	c, err := seal.Write(ctx, filepath.Join(dir, "fs"), filepath.Join(dir, sealFile), t.entry)
	if untrue := (*untrueError)(nil); errors.As(err, &untrue) {
		s.refuse(a, err)
	}
	if err != nil {
		return err
	}
	faults.Point(faults.CommitWalked)

	if err := replaceRecord(dir, committedRecord(a.id, committed, c, t), false); err != nil {
		return err
	}
	defer func() {
		// The record speaks too early if this Commit fails. Recovery corrects
		// it as well; this is for a process that lives on.
		if err != nil {
			if rerr := replaceRecord(dir, recordOf(a.id, info), false); rerr != nil {
				log.G(ctx).WithError(rerr).WithField("key", key).Warn("the record of a snapshot could not be set back to active")
			}
		}
	}()
	faults.Point(faults.CommitRecorded)

	// From the sync to the end of the transaction one Commit at a time: if a
	// sync of somebody else fails in between, its error may be about our pages,
	// although our own sync returned before. With this lock it comes before our
	// sync, and we are refused, or after our answer, when we were durable.
	s.syncing.Lock()
	defer s.syncing.Unlock()

	if err := s.sync(ctx, a); err != nil {
		return err
	}
	faults.Point(faults.CommitSynced)
	// The last instant to give up. Later the caller's patience does not matter.
	if err := ctx.Err(); err != nil {
		return err
	}

	entry := s.commitEntry(a, committed, c)
	known := false
	inTx := func(ctx context.Context, j *storage.Journal) error {
		// Asked inside the transaction, because a Prepare whose sync failed
		// while we waited for it has refused us too.
		if err := s.refusal(a); err != nil {
			return err
		}
		if err := storage.Commit(ctx, key, name, snapshots.Usage{Inodes: c.Inodes, Size: c.Blocks}, opts...); err != nil {
			return err
		}
		defer faults.Point(faults.CommitInTx)
		if err := errors.Join(j.Commit(&entry), s.sayRun(j)); err != nil {
			return err
		}
		// Known before its row can be seen, which is when it is asked for.
		known = true
		s.ready.add(entry, storage.StateEntry{})
		return nil
	}
	if s.mutantCommit(ctx, a, inTx) {
		return nil
	}
	if err := s.db.Update(context.WithoutCancel(ctx), inTx); err != nil {
		if known {
			s.ready.drop(name)
		}
		if isWriteFailure(err) {
			s.onWriteFailure(ctx, err, undo{key: name, id: a.id})
		}
		return err
	}
	s.hasSaidRun()
	s.forget(key)
	return nil
}

// committable finds the active snapshot of key and refuses what can never be
// committed, in the order of containerd's storage.CommitActive.
func (s *Snapshotter) committable(ctx context.Context, name, key string) (a *active, info snapshots.Info, err error) {
	err = s.db.View(ctx, func(ctx context.Context, _ *storage.Journal) error {
		if _, _, _, err := storage.Info(ctx, name); err == nil {
			return fmt.Errorf("name is taken: %w", errdefs.ErrAlreadyExists)
		} else if !errdefs.IsNotFound(err) {
			return err
		}
		if _, info, _, err = storage.Info(ctx, key); err != nil {
			return err
		}
		if info.Kind != snapshots.KindActive {
			return fmt.Errorf("not an active snapshot: %w", errdefs.ErrFailedPrecondition)
		}
		return nil
	})
	if err != nil {
		return nil, info, err
	}
	s.mu.Lock()
	a = s.actives[key]
	s.mu.Unlock()
	if a == nil {
		// Recovery knows every active row, and so does Prepare.
		return nil, info, fmt.Errorf("active snapshot without a cursor: %w", errdefs.ErrInternal)
	}
	return a, info, s.refusal(a)
}

// refuse makes an active snapshot one that can never be committed.
func (s *Snapshotter) refuse(a *active, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.refused == nil {
		a.refused = why
	}
}

// refusal says why an active snapshot can never be committed, or nil.
func (s *Snapshotter) refusal(a *active) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.refused == nil {
		return nil
	}
	return fmt.Errorf("%w; extract again: %w", a.refused, errdefs.ErrFailedPrecondition)
}

// sync makes everything below the snapshot's directory durable, and with it the
// whole file system.
func (s *Snapshotter) sync(ctx context.Context, a *active) error {
	if handled, err := s.mutantSync(a); handled {
		return err
	}
	err := a.cursor.Sync()
	if err == nil {
		return nil
	}
	s.onWriteFailure(ctx, err, undo{})
	return err
}

// committedInfo is the row that storage.Commit will write, for the record that
// must be on disk before.
func committedInfo(name string, info snapshots.Info, opts []snapshots.Opt) (snapshots.Info, error) {
	var base snapshots.Info
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return base, err
		}
	}
	now := time.Now().UTC()
	c := snapshots.Info{Kind: snapshots.KindCommitted, Name: name, Parent: info.Parent, Labels: base.Labels, Created: now, Updated: now}
	if c.Parent == "" {
		c.Parent = base.Parent // parallel unpack names the parent only now
	}
	return c, nil
}

func (s *Snapshotter) commitEntry(a *active, info snapshots.Info, c seal.Summary) storage.CommitEntry {
	namespace, _ := splitName(info.Name)
	e := storage.CommitEntry{
		ID: a.id, Name: info.Name, Namespace: namespace, ChainID: chainIDOf(info.Name, info.Labels),
		Parent: info.Parent, DiffID: info.Labels[labelDiffID],
		Entries: c.Entries, Bytes: c.Bytes, Digest: c.Digest,
		Time: info.Created, Strategy: storage.StrategySyncfs, BootID: s.bootID, RunID: s.runID, Epoch: s.ready.epoch,
	}
	if a.lost {
		e.Strategy = storage.StrategySyncfsCursorLost
	}
	return e
}

// forget drops what the process knows of an active snapshot that is no more.
func (s *Snapshotter) forget(key string) {
	s.mu.Lock()
	a := s.actives[key]
	delete(s.actives, key)
	s.mu.Unlock()
	if a != nil {
		_ = a.cursor.Close() // a read-only descriptor has nothing to lose
	}
}

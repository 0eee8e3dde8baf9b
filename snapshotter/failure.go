package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// probeEvery is how often a file system that refused a write is asked again.
const probeEvery = 5 * time.Second

// trouble is what is left to do after a failed write. Its mutex is the
// innermost lock but for Snapshotter.mu.
type trouble struct {
	mu      sync.Mutex
	cause   error             // of the last failure; nil: no trouble
	asked   time.Time         // of the last probe
	down    bool              // OnHealth was told
	refused map[uint64]string // active snapshots to be marked in the journal
	undo    []undo
}

// undo is a row of a transaction that was answered with an error. It may have
// become visible all the same, and is taken back then.
type undo struct {
	key string
	id  uint64
}

// isWriteFailure reports whether an error means that the kernel could not write
// something: a sync or the commit of a transaction. Any other error, for
// example a missing parent or no space for a new directory, concerns its own
// operation only.
func isWriteFailure(err error) bool {
	var sync *fsync.Error
	return errors.As(err, &sync) || errors.Is(err, storage.ErrWrite)
}

// onWriteFailure makes a failed write final (I4). Which pages the kernel dropped
// is unknown, and one error may have been reported to one descriptor only (a
// failed cache flush is reported to none on ext4 and btrfs): every snapshot that
// is active now is refused for ever.
func (s *Snapshotter) onWriteFailure(ctx context.Context, cause error, u undo) {
	if faults.Mutant("error-swallowed") || faults.Mutant("fd-shared") {
		return
	}
	s.failures.Add(1)
	var ids []uint64
	s.mu.Lock()
	for _, a := range s.actives {
		if a.refused == nil {
			a.refused = cause
			ids = append(ids, a.id)
		}
	}
	s.mu.Unlock()

	t := &s.trouble
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.refused == nil {
		t.refused = map[uint64]string{}
	}
	for _, id := range ids {
		t.refused[id] = cause.Error()
	}
	if u.id != 0 {
		t.undo = append(t.undo, u)
	}
	if t.cause == nil {
		log.G(ctx).WithError(cause).WithField("refused", len(ids)).
			Error("A WRITE FAILED: snapshots that are active now can never be committed; extract their layers again, and check the disk")
	}
	t.cause = cause
	s.probeLocked(ctx)
}

// writable is asked before anything that writes. While there is trouble it
// probes, at most once a second, and returns Unavailable if that fails.
func (s *Snapshotter) writable(ctx context.Context) error {
	t := &s.trouble
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.cause != nil && time.Since(t.asked) >= time.Second {
		s.probeLocked(ctx)
	}
	if t.cause != nil {
		return fmt.Errorf("the file system of %s takes no writes: %v: %w", s.cfg.Root, t.cause, errdefs.ErrUnavailable)
	}
	return nil
}

// probeLocked tries to put on record what the failure means: which snapshots are
// refused, and which rows never were. Success proves that the file system takes
// writes, and ends the trouble. trouble.mu must be held.
func (s *Snapshotter) probeLocked(ctx context.Context) {
	t := &s.trouble
	ctx = context.WithoutCancel(ctx)
	err := s.settle(ctx)
	t.asked = time.Now()
	if err == nil {
		if t.down {
			log.G(ctx).Warn("the file system takes writes again")
		}
		t.cause, t.refused, t.undo = nil, nil, nil
	} else {
		if !t.down {
			log.G(ctx).WithError(err).Error("THE FILE SYSTEM TAKES NO WRITES: nothing can be prepared, committed or removed until it does")
		}
		t.cause = err
	}
	if down := err != nil; down != t.down {
		t.down = down
		if s.cfg.OnHealth != nil {
			s.cfg.OnHealth(err)
		}
	}
}

func (s *Snapshotter) settle(ctx context.Context) error {
	t := &s.trouble
	if s.db.Broken() != nil {
		if err := s.db.Rewrite(ctx); err != nil {
			return err
		}
	}
	if _, err := s.spendErrors(); err != nil {
		return err
	}
	return s.db.Update(ctx, func(ctx context.Context, j *storage.Journal) error {
		for _, u := range t.undo {
			if err := takeBack(ctx, j, u); err != nil {
				return err
			}
		}
		for id, why := range t.refused {
			e, err := j.GetOpen(id)
			if errors.Is(err, storage.ErrNoEntry) {
				continue // removed, or taken back
			}
			if err != nil {
				return err
			}
			e.Poisoned = why
			if err := j.PutOpen(e); err != nil {
				return err
			}
		}
		return nil
	})
}

// spendErrors asks for the writeback errors that nobody has been told of yet, and
// returns the one it found. The kernel keeps the last of them for the next
// descriptor that is opened and asks (errseq_sample of lib/errseq.c): that would
// be the cursor of a layer that is extracted when the disk is well again, for an
// error of a time before it. What was active then has a cursor of its own. An
// error of now is the second result.
func (s *Snapshotter) spendErrors() (old, now error) {
	for range 2 {
		cursor, err := fsync.OpenCursor(s.snapshotsDir())
		if err != nil {
			return nil, err
		}
		now = cursor.Sync()
		_ = cursor.Close() // a read-only descriptor has nothing to lose
		if now == nil {
			return old, nil
		}
		old = now
	}
	return nil, now
}

// takeBack removes a row whose transaction was answered with an error. Its
// directory becomes an orphan and is swept like any other.
func takeBack(ctx context.Context, j *storage.Journal, u undo) error {
	id, _, _, err := storage.Info(ctx, u.key)
	if errdefs.IsNotFound(err) || err == nil && id != u.id {
		return nil
	}
	if err == nil {
		err = storage.Remove(ctx, u.key)
	}
	if err != nil {
		return err
	}
	return j.Remove(u.id, time.Now().UTC())
}

// watch probes while there is trouble, notices a file system that was remounted
// read-only, and keeps space for the database, until ctx ends.
func (s *Snapshotter) watch(ctx context.Context) {
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	for {
		s.trouble.mu.Lock()
		if s.trouble.cause != nil {
			s.probeLocked(ctx)
		}
		healthy := s.trouble.cause == nil
		s.trouble.mu.Unlock()
		if healthy {
			s.look(ctx)
			s.saySoon(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// look asks for what the kernel may have done to the file system without being
// asked to write. Since Linux 6.15 an ext4 that made itself read-only after an
// error does not say so to statfs(2); it refuses fallocate(2).
func (s *Snapshotter) look(ctx context.Context) {
	_, err := fsync.Inspect(s.cfg.Root)
	if !errors.Is(err, fsync.ErrUnsuitable) {
		err = s.db.Reserve()
	}
	switch {
	case errors.Is(err, fsync.ErrUnsuitable), errors.Is(err, unix.EROFS), errors.Is(err, unix.EIO):
		s.onWriteFailure(ctx, err, undo{})
	case err != nil:
		log.G(ctx).WithError(err).Debug("no space was set aside for metadata.db")
	}
}

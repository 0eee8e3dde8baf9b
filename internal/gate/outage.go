package gate

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/metrics"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// probeEvery is how often a file system that refused a write is probed.
const probeEvery = 5 * time.Second

// outage is what is left to do after a failed write.
type outage struct {
	mu       sync.Mutex
	cause    error             // of the last failure; nil: there is no outage
	probed   time.Time         // the last time
	down     bool              // OnHealth was called with an error
	poisoned map[uint64]string // active snapshots to be marked in the journal
	undo     []Undo
}

// fail makes a failed write final.
func (g *Gate) fail(ctx context.Context, cause error, undo *Undo) {
	ids, n := g.writers.poison(cause)

	metrics.SyncErrors.Inc()
	o := &g.outage
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.poisoned == nil {
		o.poisoned = map[uint64]string{}
	}
	for _, id := range ids {
		o.poisoned[id] = cause.Error()
	}
	if undo != nil && undo.ID != 0 {
		o.undo = append(o.undo, *undo)
	}
	if o.cause == nil {
		log.G(ctx).WithField("event", "write_failed").WithError(cause).WithField("refused", n).
			Error("a write failed: snapshots that are active now can never be committed; extract their layers again, and check the disk")
	}
	o.cause = cause
	g.probe(ctx)
}

// current returns the cause of an outage, or nil, after a probe if the last one was more
// than a second ago.
func (g *Gate) current(ctx context.Context) error {
	o := &g.outage
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.cause != nil && time.Since(o.probed) >= time.Second {
		g.probe(ctx)
	}
	return o.cause
}

// probe tries to write into the journal what a failure means: which snapshots are
// poisoned, and which rows are taken back. Success proves that the file system accepts
// writes, and ends the outage. outage.mu must be held.
func (g *Gate) probe(ctx context.Context) {
	o := &g.outage
	ctx = context.WithoutCancel(ctx)
	err := g.settle(ctx)
	if fsync.IsFull(err) && g.db.Spend() {
		err = g.settle(ctx)
	}
	o.probed = time.Now()
	if err == nil {
		if o.down {
			log.G(ctx).WithField("event", "writes_resumed").Warn("the file system accepts writes again")
		}
		o.cause, o.poisoned, o.undo = nil, nil, nil
	} else {
		if !o.down {
			log.G(ctx).WithField("event", "writes_blocked").WithError(err).
				Error("the file system does not accept writes: nothing can be prepared, committed or removed until it does")
		}
		o.cause = err
	}
	if down := err != nil; down != o.down {
		o.down = down
		if g.cfg.OnHealth != nil {
			g.cfg.OnHealth(err)
		}
	}
}

func (g *Gate) settle(ctx context.Context) error {
	o := &g.outage
	if g.db.Broken() != nil {
		if err := g.db.Rewrite(ctx); err != nil {
			return err
		}
	}
	if _, err := g.DrainErrors(); err != nil {
		return err
	}
	return g.db.Update(ctx, func(ctx context.Context, j *storage.Journal) error {
		for _, u := range o.undo {
			if err := takeBack(ctx, j, u); err != nil {
				return err
			}
		}
		for id, why := range o.poisoned {
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

// DrainErrors collects the writeback error that was reported to no descriptor yet, and
// returns it as old. The kernel keeps the last one for the next descriptor that is
// opened and synced (errseq_sample of lib/errseq.c): that would be the cursor of a layer
// that is extracted when the disk works again, for an error that is older than it. A
// snapshot that was active then has a cursor of its own. now is an error that happens
// again, in the sync of a second descriptor.
func (g *Gate) DrainErrors() (old, now error) {
	for range 2 {
		cursor, err := fsync.OpenCursor(g.cfg.Dir)
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

// takeBack removes a row whose transaction returned an error. Its directory becomes an
// orphan and is removed like any other.
func takeBack(ctx context.Context, j *storage.Journal, u Undo) error {
	id, _, _, err := storage.Info(ctx, u.Key)
	if errdefs.IsNotFound(err) || err == nil && id != u.ID {
		return nil
	}
	if err == nil {
		err = storage.Remove(ctx, u.Key)
	}
	if err != nil {
		return err
	}
	return j.Remove(u.ID, time.Now().UTC())
}

// UnlessFull runs a step of a recovery. It returns nil when the disk has no space for
// it, because the layers must be served and snapshots be removed all the same; the next
// recovery runs the step again. Other errors are returned.
func (g *Gate) UnlessFull(ctx context.Context, step func() error) error {
	err := step()
	if !fsync.IsFull(err) {
		return err
	}
	// The database alone decides: an active snapshot is not poisoned because there
	// is no space to mark its entry.
	if g.db.Broken() != nil {
		g.fail(ctx, err, nil)
	}
	log.G(ctx).WithField("event", "disk_full").WithError(err).Warn("the disk is full: a step of the recovery is left to the next start")
	return nil
}

// RecoverUpdate is Update for a recovery, see [Gate.UnlessFull].
func (g *Gate) RecoverUpdate(ctx context.Context, tx func(context.Context, *storage.Journal) error) (full bool, err error) {
	err = g.UnlessFull(ctx, func() error {
		err := g.db.Update(ctx, tx)
		full = fsync.IsFull(err)
		return err
	})
	return full, err
}

// Watch probes during an outage, detects a file system that was remounted read-only,
// and reserves space for the database, until ctx ends. While the gate is open it
// calls flush in each round; wake begins the next round early.
func (g *Gate) Watch(ctx context.Context, wake <-chan struct{}, flush func(context.Context)) {
	tick := time.NewTicker(probeEvery)
	defer tick.Stop()
	for {
		if g.probeIfDown(ctx) {
			g.checkReadOnly(ctx)
			flush(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-wake:
		}
	}
}

// probeIfDown probes during an outage, and reports whether there is none.
func (g *Gate) probeIfDown(ctx context.Context) bool {
	o := &g.outage
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.cause != nil {
		g.probe(ctx)
	}
	return o.cause == nil
}

// checkReadOnly detects that the kernel has made the file system read-only although
// nothing was written. Since Linux 6.15 an ext4 that made itself read-only after an
// error does not report it in statfs(2); it refuses fallocate(2).
func (g *Gate) checkReadOnly(ctx context.Context) {
	_, err := fsync.Inspect(g.cfg.Root)
	if !errors.Is(err, fsync.ErrUnsuitable) {
		err = g.db.Reserve()
	}
	switch {
	case errors.Is(err, fsync.ErrUnsuitable), errors.Is(err, unix.EROFS), errors.Is(err, unix.EIO):
		g.fail(ctx, err, nil)
	case err != nil:
		log.G(ctx).WithError(err).Debug("no space was reserved for metadata.db")
	}
}

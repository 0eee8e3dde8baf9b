package layers

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/gate"
	"github.com/durable-snapshotter/durable-snapshotter/internal/recorded"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// recorder writes to the journal what must outlive this process: that it has the root,
// and what is known of layers.
type recorder struct {
	table         *table
	gate          *gate.Gate
	bootID, runID string

	flushMu sync.Mutex // held while states are written; outside table.mu

	run         storage.Run // guarded by table.mu, as is whether the journal has it
	runRecorded bool
}

// begin notes that this daemon has the root now.
func (r *recorder) begin(last storage.Run) (unclean bool) {
	r.table.epoch = recorded.Epoch(last, r.bootID)
	r.run = storage.Run{
		BootID: r.bootID, RunID: r.runID, Epoch: r.table.epoch, Started: time.Now().UTC(), ImagesEpoch: last.ImagesEpoch,
	}
	if last.BootID == "" { // a new root: no image has a layer in it
		r.run.ImagesEpoch = r.run.Epoch
	}
	r.table.brake.Load(last)
	return recorded.WentDown(last, r.bootID)
}

// RecordRun writes into the journal that this daemon has the root, unless it has
// done so. Recovery does it before the socket answers; on a full disk it is the
// first Commit that does, so that no layer can outlive it.
func (r *recorder) RecordRun(j *storage.Journal) error {
	r.table.mu.Lock()
	done := r.runRecorded
	r.table.mu.Unlock()
	if done {
		return nil
	}
	return j.PutRun(r.runEntry())
}

// runEntry is what the journal must have of this daemon.
func (r *recorder) runEntry() storage.Run {
	r.table.mu.Lock()
	run := r.run
	r.table.brake.Note(&run)
	r.table.mu.Unlock()
	return run
}

// RunRecorded is called after a transaction with RecordRun.
func (r *recorder) RunRecorded() {
	r.table.mu.Lock()
	r.runRecorded = true
	r.table.mu.Unlock()
}

// flush writes what verifications have found to the journal. What cannot be written
// now is kept for the next flush; lost in a crash, it costs another verification.
func (r *recorder) flush(ctx context.Context) error {
	t := r.table
	r.flushMu.Lock()
	defer r.flushMu.Unlock()
	t.mu.Lock()
	pending := t.pending
	t.pending = map[uint64]storage.StateEntry{}
	braked := t.brake.TakePending()
	t.mu.Unlock()
	if len(pending) == 0 && !braked {
		return nil
	}
	run := r.runEntry()
	err := r.gate.Update(ctx, nil, func(_ context.Context, j *storage.Journal) error {
		if braked {
			if err := j.PutRun(run); err != nil {
				return err
			}
		}
		for _, id := range slices.Sorted(maps.Keys(pending)) {
			if _, err := j.GetCommitted(id); errors.Is(err, storage.ErrNoEntry) {
				continue // removed meanwhile
			} else if err != nil {
				return err
			}
			if err := j.PutState(pending[id]); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		return nil
	}
	log.G(ctx).WithError(err).Warn("states of layers were not written")
	t.mu.Lock()
	if braked {
		t.brake.SetPending()
	}
	for id, state := range pending {
		if _, newer := t.pending[id]; !newer {
			t.pending[id] = state
		}
	}
	t.mu.Unlock()
	return err
}

// ImagesDue reports whether the images were not checked since the last unclean shutdown.
func (r *recorder) ImagesDue() bool {
	r.table.mu.Lock()
	defer r.table.mu.Unlock()
	return r.run.ImagesEpoch != r.run.Epoch
}

// ImagesChecked notes that they were. After an error the next start of the daemon checks
// them again.
func (r *recorder) ImagesChecked(ctx context.Context) error {
	r.table.mu.Lock()
	r.run.ImagesEpoch = r.run.Epoch
	r.table.mu.Unlock()
	run := r.runEntry()
	return r.gate.Update(ctx, nil, func(_ context.Context, j *storage.Journal) error { return j.PutRun(run) })
}

// recordCleanStop notes a clean stop. Without it, the next boot verifies all layers:
// also when a finding could not be written, because it would never be found again.
func (r *recorder) recordCleanStop(ctx context.Context) {
	err := r.flush(ctx)
	if err == nil {
		run := r.runEntry()
		run.Stopped = time.Now().UTC()
		err = r.gate.Update(ctx, nil, func(_ context.Context, j *storage.Journal) error { return j.PutRun(run) })
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("a clean stop was not noted; after a boot all layers are verified")
	}
}

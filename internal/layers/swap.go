package layers

import (
	"context"
	"errors"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/internal/gate"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// swap puts the new tree into its place. The journal knows of it before, so
// that after a crash at any instant it is clear which of the two trees is there:
// see settleHealing. When it returns true, dir is the damaged tree.
func (h *healer) swap(ctx context.Context, dir string, writer *gate.Writer, healed storage.CommitEntry) (exchanged bool, err error) {
	unlock, err := h.keys.Lock(ctx, healed.Name)
	if err != nil {
		return false, err
	}
	defer unlock()
	err = h.gate.Synced(ctx, writer, func(ctx context.Context) error {
		return h.gate.Do(ctx, func() error { return h.swapSynced(ctx, dir, healed, &exchanged) })
	})
	return exchanged, err
}

// swapSynced is swap after the sync of the new tree.
func (h *healer) swapSynced(ctx context.Context, dir string, healed storage.CommitEntry, exchanged *bool) error {
	if err := fsync.MkdirAll(h.root.Snapshots(), 0o700); err != nil {
		return err
	}
	update := func(state storage.StateEntry, replace bool) error {
		// What was found before must not be written after this.
		h.recorder.flushMu.Lock()
		defer h.recorder.flushMu.Unlock()
		h.table.discardPending(healed.ID)
		return h.gate.Update(ctx, nil, func(_ context.Context, j *storage.Journal) error {
			now, err := j.GetCommitted(healed.ID)
			if errors.Is(err, storage.ErrNoEntry) || err == nil && !now.Ref().SameLayer(healed.Ref()) {
				return errRemoved
			}
			if err == nil && replace {
				err = j.Replace(healed)
			}
			return errors.Join(err, j.PutState(state))
		})
	}
	healing, ready := h.swapStates(healed)
	if err := update(healing, false); err != nil {
		return err
	}
	faults.Point(faults.HealJournalled)
	if err := layout.Exchange(dir, h.root.Dir(healed.ID)); err != nil {
		return err
	}
	*exchanged = true
	faults.Point(faults.HealExchanged)
	if err := errors.Join(fsync.Dir(h.root.Snapshots()), fsync.Dir(h.root.Healing())); err != nil {
		return err
	}
	faults.Point(faults.HealPlaced)
	if err := update(ready, true); err != nil {
		return err
	}
	faults.Point(faults.HealDone)
	if err := h.replaced.Keep(ctx, dir); err != nil {
		log.G(ctx).WithError(err).Warn("the damaged tree of a healed layer was not put away; the next start does it")
	}
	return nil
}

// swapStates are the states of a layer while its tree is replaced, and after that.
// The first keeps what was found, in case that a crash leaves the damaged tree.
func (h *healer) swapStates(healed storage.CommitEntry) (healing, ready storage.StateEntry) {
	h.table.mu.Lock()
	defer h.table.mu.Unlock()
	healing = storage.StateEntry{ID: healed.ID}
	if l := h.table.layers[healed.Name]; l != nil {
		healing = l.state
	}
	healing.State, healing.Healing = storage.StateHealing, &healed
	ready = h.table.readyState(&layer{entry: healed, state: healing})
	return healing, ready
}

// Package layers with planted defects: those that are too long for an edit, see tests/defects.
// go build -overlay adds this file to the package.
package layers

import (
	"context"
	"errors"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// plantedHealed is the directory whose file system is synced when the tree of a damaged
// layer was extracted again.
func plantedHealed(dir string) string {
	if planted("heal-no-sync") {
		return "/"
	}
	return dir
}

// plantedSwap exchanges trees and writes the journal in another order than swapSynced.
func (h *healer) plantedSwap(dir string, healed storage.CommitEntry, update func(storage.StateEntry, bool) error) (handled bool, err error) {
	ready := storage.StateEntry{ID: healed.ID, State: storage.StateReady, Epoch: h.table.epoch, Checked: time.Now().UTC()}
	place := func() error { return layout.Exchange(dir, h.root.Dir(healed.ID)) }
	switch {
	case planted("heal-ready-first"):
		if err := update(ready, true); err != nil {
			return true, err
		}
		return true, errors.Join(place(), h.replaced.Keep(context.Background(), dir))
	case planted("heal-swap-first"):
		if err := place(); err != nil {
			return true, err
		}
		if err := update(storage.StateEntry{ID: healed.ID, State: storage.StateHealing, Healing: &healed}, false); err != nil {
			return true, err
		}
		if err := errors.Join(fsync.Dir(h.root.Snapshots()), fsync.Dir(h.root.Healing())); err != nil {
			return true, err
		}
		return true, errors.Join(update(ready, true), h.replaced.Keep(context.Background(), dir))
	}
	return false, nil
}

// plantedTrusts reports whether a defect is active that the seals of other layers would
// show.
func plantedTrusts() bool {
	return planted("heal-ready-first") || planted("heal-swap-first") || planted("heal-intent-believed")
}

// Package snapshotter with planted defects: those that are too long for an edit, see tests/defects.
// go build -overlay adds this file to the package.
package snapshotter

import (
	"os"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/internal/active"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
)

// plantedPrepared syncs as soon as the extraction has written something, which is too
// early for the rest of it. a is nil for a View.
func (s *Snapshotter) plantedPrepared(a *active.Snapshot) {
	if a == nil || !planted("syncfs-before-last-write") {
		return
	}
	go func() {
		for range 10_000 {
			if entries, err := os.ReadDir(s.root.Tree(a.ID)); err != nil || len(entries) > 0 {
				_ = s.gate.SyncApart(s.background, a.Writer, nil)
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
}

// plantedWait is how long a Prepare waits for its parent.
func plantedWait() time.Duration {
	if planted("prepare-waits") {
		return layers.DefaultWait
	}
	return promptly
}

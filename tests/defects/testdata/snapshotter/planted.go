// Package snapshotter with planted defects: those that are too long for an edit, see tests/defects.
// go build -overlay adds this file to the package.
package snapshotter

import (
	"io/fs"
	"os"
	"path/filepath"
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

// plantedTimes gives the directories below root the time at which they were extracted. What
// it returns gives them those of the tar again, too late for the sync of Apply.
func plantedTimes(root string) func() {
	times := map[string]time.Time{}
	if planted("apply-times-late") {
		now := time.Now()
		_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			times[path] = info.ModTime()
			return os.Chtimes(path, now, now)
		})
	}
	return func() {
		for path, at := range times {
			_ = os.Chtimes(path, at, at)
		}
	}
}

// plantedWait is how long a Prepare waits for its parent.
func plantedWait() time.Duration {
	if planted("prepare-waits") {
		return layers.DefaultWait
	}
	return promptly
}

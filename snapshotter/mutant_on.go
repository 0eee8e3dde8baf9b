//go:build faults

package snapshotter

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Planted defects: each is a mistake that somebody could make in commit.go or
// heal.go. The crash tests must catch every one of them, or they prove nothing.

// sharedFD is the one descriptor of the mutant "fd-shared".
var sharedFD = sync.OnceValues(func() (int, error) {
	return unix.Open(sharedDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
})

var sharedDir string

// mutantPrepared syncs as soon as the extraction has written something, which is
// too early for the rest of it.
func (s *Snapshotter) mutantPrepared(a *active) {
	if !faults.Mutant("syncfs-before-last-write") {
		return
	}
	go func() {
		for range 10_000 {
			if entries, err := os.ReadDir(filepath.Join(s.dir(a.id), "fs")); err != nil || len(entries) > 0 {
				_ = a.cursor.Sync()
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
}

func (s *Snapshotter) mutantSync(a *active) (handled bool, err error) {
	switch {
	case faults.Mutant("no-syncfs"), faults.Mutant("tx-before-syncfs"), faults.Mutant("syncfs-before-last-write"):
		return true, nil
	case faults.Mutant("error-swallowed"):
		_ = a.cursor.Sync()
		return true, nil
	case faults.Mutant("fd-late"):
		late, err := fsync.OpenCursor(s.dir(a.id))
		if err != nil {
			return true, err
		}
		defer late.Close()
		return true, late.Sync()
	case faults.Mutant("fd-shared"):
		sharedDir = s.snapshotsDir()
		fd, err := sharedFD()
		if err == nil {
			err = unix.Syncfs(fd)
		}
		return true, err
	case faults.Mutant("syncfs-wrong-fs"):
		wrong, err := fsync.OpenCursor("/")
		if err != nil {
			return true, err
		}
		defer wrong.Close()
		return true, wrong.Sync()
	}
	return false, nil
}

func (s *Snapshotter) mutantCommit(ctx context.Context, a *active, inTx func(context.Context, *storage.Journal) error) bool {
	ctx = context.WithoutCancel(ctx)
	switch {
	case faults.Mutant("ack-before-tx"):
		go func() {
			time.Sleep(200 * time.Millisecond)
			_ = s.db.Update(ctx, inTx)
		}()
		return true
	case faults.Mutant("tx-before-syncfs"):
		if s.db.Update(ctx, inTx) != nil {
			return false
		}
		_ = a.cursor.Sync()
		return true
	}
	return false
}

// mutantHealed is the directory whose file system is synced when the tree of a
// damaged layer was extracted again.
func mutantHealed(dir string) string {
	if faults.Mutant("heal-no-sync") {
		return "/"
	}
	return dir
}

// mutantSwap swaps trees and speaks of it in another order than swap does.
func (s *Snapshotter) mutantSwap(dir string, healed storage.CommitEntry, update func(storage.StateEntry, bool) error) (handled bool, err error) {
	ready := storage.StateEntry{ID: healed.ID, State: storage.StateReady, Epoch: s.ready.epoch, Checked: time.Now().UTC()}
	place := func() error { return exchange(dir, s.dir(healed.ID)) }
	switch {
	case faults.Mutant("heal-ready-first"):
		if err := update(ready, true); err != nil {
			return true, err
		}
		return true, errors.Join(place(), s.keepReplaced(dir))
	case faults.Mutant("heal-swap-first"):
		if err := place(); err != nil {
			return true, err
		}
		if err := update(storage.StateEntry{ID: healed.ID, State: storage.StateHealing, Healing: &healed}, false); err != nil {
			return true, err
		}
		if err := errors.Join(fsync.Dir(s.snapshotsDir()), fsync.Dir(s.healingDir())); err != nil {
			return true, err
		}
		return true, errors.Join(update(ready, true), s.keepReplaced(dir))
	}
	return false, nil
}

// mutantBelieves takes the journal's word that trees were going to be swapped
// for the deed.
func (s *Snapshotter) mutantBelieves(healed *storage.CommitEntry) bool {
	if !faults.Mutant("heal-swap-first") && !faults.Mutant("heal-intent-believed") {
		return false
	}
	healed.Epoch = s.ready.epoch
	return true
}

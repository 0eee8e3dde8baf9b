//go:build faults

package snapshotter

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Planted defects: each is a mistake that somebody could make in commit.go. The
// crash tests must catch every one of them, or they prove nothing.

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

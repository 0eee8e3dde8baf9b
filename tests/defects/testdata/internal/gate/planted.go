// Package gate with planted defects: those that are too long for an edit, see tests/defects.
// go build -overlay adds this file to the package.
package gate

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// sharedFD is the one descriptor of the defect "fd-shared".
var sharedFD = sync.OnceValues(func() (int, error) {
	return unix.Open(sharedDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
})

var sharedDir string

// plantedSync is the sync of a Commit. Writers without an open entry, those of a heal,
// are not affected.
func (g *Gate) plantedSync(ctx context.Context, w *Writer) error {
	if w.id == 0 {
		return g.sync(ctx, w)
	}
	switch {
	case planted("no-syncfs"), planted("tx-before-syncfs"), planted("syncfs-before-last-write"):
		return nil
	case planted("error-swallowed"):
		_ = w.cursor.Sync()
		return nil
	case planted("fd-late"):
		return syncAt(g.cfg.Dir)
	case planted("fd-shared"):
		sharedDir = g.cfg.Dir
		fd, err := sharedFD()
		if err == nil {
			err = unix.Syncfs(fd)
		}
		return err
	case planted("syncfs-wrong-fs"):
		return syncAt("/")
	}
	return g.sync(ctx, w)
}

// syncAt syncs a file system with a descriptor that is opened for it.
func syncAt(dir string) error {
	cursor, err := fsync.OpenCursor(dir)
	if err != nil {
		return err
	}
	defer cursor.Close()
	return cursor.Sync()
}

// plantedCommit runs the transaction of a Commit in its own way, and reports whether it
// has.
func (g *Gate) plantedCommit(ctx context.Context, w *Writer, inTx func(context.Context, *storage.Journal) error) bool {
	switch {
	case planted("ack-before-tx"):
		go func() {
			time.Sleep(200 * time.Millisecond)
			_ = g.db.Update(ctx, inTx)
		}()
		return true
	case planted("tx-before-syncfs"):
		if g.db.Update(ctx, inTx) != nil {
			return false
		}
		_ = w.cursor.Sync()
		return true
	}
	return false
}

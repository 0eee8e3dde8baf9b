package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"

	cstorage "github.com/containerd/containerd/v2/core/snapshots/storage"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// least is how many bytes behind what the database uses should have been written before. A transaction
// that writes to them needs no commit of the journal of the file system: it only overwrites. One commit of the journal
// takes as long as the rest of a transaction, and waits for what others write, too (data=ordered of ext4).
const least = growBy / 2

// room notes how many bytes a transaction has used, and has more of them written when few are left.
func (db *DB) room(used int64) {
	if used+least <= db.written.Load() || !db.extending.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer db.extending.Store(false)
		db.swap.RLock()
		defer db.swap.RUnlock()
		if db.usable(true) != nil {
			return
		}
		// An error, as of a full disk, is met again by a transaction that needs the room: bbolt makes it itself.
		written, err := writeRoom(context.Background(), db.ms, db.path, db.written.Load())
		if err != nil {
			written = used + least // not again for each transaction
		}
		db.written.Store(written)
	}()
}

// writeRoom writes zeros behind what the database uses, where nothing was written before: written is what the previous
// call has returned, or 0. No transaction uses what lies there, and none begins to while this has bbolt's lock of
// writers. The file becomes longer where it ends before.
func writeRoom(ctx context.Context, ms *cstorage.MetaStore, path string, written int64) (_ int64, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // as in DB.WithTransaction
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%s: %v: %w", path, p, ErrDamaged)
		}
	}()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()            // it was synced, or has failed
	done := errors.New("done") // rolls a transaction back that has changed nothing
	if err := inBolt(ctx, ms, true, func(tx *bolt.Tx) error {
		from, to := max(tx.Size(), written), tx.Size()+growBy
		if from+least > to {
			return done // as it is after a transaction that has used much, and another call
		}
		if _, err := f.WriteAt(make([]byte, to-from), from); err != nil {
			return err
		}
		written = to
		return done
	}); !errors.Is(err, done) {
		return 0, err
	}
	// After the transaction: others wait for it only if they sync now. What fails here fails in their sync, too,
	// because each descriptor reports it.
	return written, unix.Fdatasync(int(f.Fd()))
}

package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	cstorage "github.com/containerd/containerd/v2/core/snapshots/storage"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/boltcheck"
	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
)

// lockWait is how long Open waits for another process to leave the root: long
// enough for a daemon that is stopping, short enough for an operator.
const lockWait = 2 * time.Second

// Options of Open.
type Options struct {
	// History is the number of removed snapshots whose commit entries are
	// kept. Entries of existing snapshots are always kept.
	History uint64
	// Passing: the root is wanted for a short time, by a verb and not by a daemon. A
	// daemon that starts meanwhile waits.
	Passing bool
	// OnWait, if not nil, is called once when Open begins to wait for such a process.
	OnWait func()
}

// Open locks the directory root and opens metadata.db in it; when there is
// neither a database nor a snapshot, it makes an empty one.
//
// While a passing process has the root, Open waits, until ctx ends. Errors: ErrLocked
// when another process serves this root, or, for a passing one, has it; ErrMissing and
// ErrDamaged as described there, layout.ErrNewer for a database of a newer version.
// In none of these cases is anything changed.
func Open(ctx context.Context, root string, o Options) (_ *DB, err error) {
	lock, err := lockRoot(ctx, root, o)
	if err != nil {
		return nil, err
	}
	db := &DB{path: filepath.Join(root, FileName), keep: o.History, lock: lock}
	defer func() {
		if err != nil {
			if db.ms != nil {
				err = errors.Join(err, db.ms.Close())
			}
			err = errors.Join(err, lock.Close())
		}
	}()

	// Left by a creation or a rewrite that a crash has interrupted. They were
	// never the database.
	for _, suffix := range []string{".new", ".rewrite"} {
		if err := removeIfThere(db.path + suffix); err != nil {
			return nil, err
		}
	}
	if _, err := os.Lstat(db.path); errors.Is(err, os.ErrNotExist) {
		n, err := countSnapshots(root)
		if err != nil {
			return nil, err
		}
		if n > 0 {
			return nil, fmt.Errorf("%w: %s, %d directories below snapshots/", ErrMissing, db.path, n)
		}
		if err := create(ctx, db.path); err != nil {
			return nil, fmt.Errorf("create %s: %w", db.path, err)
		}
	} else if err != nil {
		return nil, err
	} else if err := db.examine(); err != nil {
		return nil, fmt.Errorf("open %s: %w", db.path, err)
	}

	if db.ms, err = openStore(db.path); err != nil {
		return nil, fmt.Errorf("open %s: %w", db.path, err)
	}
	return db, db.upgrade(ctx)
}

// examine verifies the file, of which nothing has been read before.
func (db *DB) examine() error {
	err := fromDisk(db.path)
	known, damaged := verify(db.path)
	db.known.Store(known)
	return errors.Join(err, damaged)
}

// fromDisk makes the kernel show of a file what is on disk, and nothing else.
//
// They differ after an earlier process was killed between a write and the end of
// its sync, or after a sync had failed. bbolt would take a meta page for durable
// because it can be read, and overwrite pages that the one on disk needs. And
// ext4 would lose what is written later to a page whose first write had failed:
// fdatasync succeeds, the extent stays marked as unwritten, and the next mount
// reads zeros (measured on Linux 6.18).
func fromDisk(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if f.Sync() != nil {
		// This may be an error of an earlier process that was reported to no
		// descriptor: the kernel keeps it for the next one. What is on disk is read
		// next, so only an error of this process matters.
		if err := f.Sync(); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return errors.Join(&os.PathError{Op: "fadvise", Path: path, Err: err}, f.Close())
	}
	return f.Close()
}

// passing are the options of a process that has the root for a short time.
var passing = Options{Passing: true}

// lockRoot takes an advisory lock on the directory itself, so that it holds
// before there is a database and while Rewrite replaces it.
func lockRoot(ctx context.Context, root string, o Options) (*os.File, error) {
	f, err := os.Open(root)
	if err != nil {
		return nil, err
	}
	err = waitForLock(f, unix.LOCK_EX)
	for tries := 0; errors.Is(err, ErrLocked) && !o.Passing && tries < 1; err = waitForLock(f, unix.LOCK_EX) {
		// Once more when nothing passes, because it may just have ended.
		if tries++; hasPassing(f) {
			if tries = 0; o.OnWait != nil {
				o.OnWait()
				o.OnWait = nil
			}
		}
		if ctx.Err() != nil {
			err = ctx.Err()
			break
		}
	}
	if err == nil && o.Passing {
		err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Len: 1})
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// hasPassing reports whether the process that has the lock of a root is a passing one:
// it has a second lock, of the other kind (fcntl(2)), which does not interfere with
// flock(2) and ends with the same descriptor.
func hasPassing(root *os.File) bool {
	lock := unix.Flock_t{Type: unix.F_WRLCK, Len: 1}
	return unix.FcntlFlock(root.Fd(), unix.F_OFD_GETLK, &lock) == nil && lock.Type != unix.F_UNLCK
}

// waitForLock takes an advisory lock (flock(2)), or returns ErrLocked when
// another process keeps it.
func waitForLock(f *os.File, how int) error {
	for deadline := time.Now().Add(lockWait); ; time.Sleep(50 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return &os.PathError{Op: "flock", Path: f.Name(), Err: err}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s is %w", f.Name(), ErrLocked)
		}
	}
}

// countSnapshots counts the directories that only a database could explain.
func countSnapshots(root string) (int, error) {
	entries, err := os.ReadDir(layout.Root{Path: root}.Snapshots())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, err
	}
	n := 0
	for _, e := range entries {
		if _, err := strconv.ParseUint(e.Name(), 10, 64); err == nil {
			n++
		}
	}
	return n, nil
}

// mapSize is the part of the address space that the database gets when it is
// opened: more than it will ever need. When it outgrows its map, bbolt drops the
// map before it makes a larger one, and if the file system does not allow that
// any more (one that has shut itself down does not), nothing can be read.
const mapSize = 256 << 20

// growBy is what the file grows by, also where bbolt makes it grow (see room). bbolt's own step is
// 16 MiB once the map is large.
const growBy = 256 << 10

// openStore opens the file through containerd's MetaStore, which opens it at
// its first transaction: run one, so that errors come now.
func openStore(path string) (*cstorage.MetaStore, error) {
	ms, err := cstorage.NewMetaStore(path, func(o *bolt.Options) error {
		o.Timeout = lockWait
		o.InitialMmapSize = mapSize
		return nil
	})
	if err != nil {
		return nil, err
	}
	_, tx, err := ms.TransactionContext(context.Background(), false)
	if err != nil {
		if errors.Is(err, berrors.ErrTimeout) {
			err = fmt.Errorf("%w (its lock is held): %w", ErrLocked, err)
		}
		return nil, errors.Join(err, ms.Close())
	}
	btx, err := boltTx(tx)
	if err != nil {
		return nil, errors.Join(err, tx.Rollback(), ms.Close())
	}
	btx.DB().AllocSize = growBy
	return ms, tx.Rollback()
}

// create makes an empty database so that a crash at any instant leaves none or
// a whole one. bbolt's own creation does not: it writes its first pages into
// the final name and never syncs the directory.
func create(ctx context.Context, path string) error {
	next := path + ".new"
	if err := fill(ctx, next); err != nil {
		return errors.Join(err, removeIfThere(next))
	}
	faults.Point(faults.BirthWritten)
	if err := os.Rename(next, path); err != nil {
		return err
	}
	faults.Point(faults.BirthRenamed)
	return fsync.Dir(filepath.Dir(path))
}

// isBtrfs is for fields of 32 bits, too: the number is negative there.
func isBtrfs(st *unix.Statfs_t) bool { return uint32(st.Type) == unix.BTRFS_SUPER_MAGIC }

// inPlace makes an empty file whose blocks are overwritten in place on btrfs too
// (FS_NOCOW_FL, which has an effect on empty files only). Copied on write, a
// database on a full disk could not even record that a snapshot is removed. The
// file loses btrfs's checksums; bbolt and our records have their own.
func inPlace(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return errors.Join(&os.PathError{Op: "statfs", Path: path, Err: err}, f.Close())
	}
	if isBtrfs(&st) {
		const nocow = 0x00800000 // linux/fs.h
		if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, nocow); err != nil {
			return errors.Join(&os.PathError{Op: "set flags", Path: path, Err: err}, f.Close())
		}
	}
	return f.Close()
}

// fill writes an empty database and syncs it.
func fill(ctx context.Context, path string) error {
	if err := inPlace(path); err != nil {
		return err
	}
	ms, err := openStore(path)
	if err != nil {
		return err
	}
	err = ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		// containerd creates its buckets with the first snapshot, and until
		// then answers a walk over nothing with NotFound. Make and unmake one.
		const key = "birth"
		if _, err := cstorage.CreateSnapshot(ctx, snapshots.KindActive, key, ""); err != nil {
			return err
		}
		_, _, err := cstorage.Remove(ctx, key)
		return err
	})
	if err == nil {
		err = inBolt(ctx, ms, true, createJournal)
	}
	if err == nil {
		_, _ = writeRoom(ctx, ms, path, 0) // a full disk may have room for a start, and a removal
	}
	if err = errors.Join(err, ms.Close()); err != nil {
		return err
	}
	return fsync.File(path)
}

// inBolt runs fn in a transaction of its own, on the bolt level.
func inBolt(ctx context.Context, ms *cstorage.MetaStore, writable bool, fn func(*bolt.Tx) error) error {
	_, trans, err := ms.TransactionContext(ctx, writable)
	if err != nil {
		return err
	}
	tx, err := boltTx(trans)
	if err == nil {
		err = fn(tx)
	}
	if err != nil || !writable {
		return errors.Join(err, rollback(trans))
	}
	return trans.Commit()
}

// verify reads the whole database, read-only, and returns an error that wraps
// ErrDamaged when the disk cannot read it, or bbolt's pages or our journal are inconsistent.
// bbolt checks little by itself: it panics or faults on bad pages.
func verify(path string) (known *entries, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v: %w", p, ErrDamaged)
		}
	}()
	if st, err := os.Stat(path); err != nil {
		return nil, err
	} else if !st.Mode().IsRegular() || st.Size() == 0 {
		// bbolt would initialize an empty file, and all snapshots would be lost.
		return nil, fmt.Errorf("not a file with content: %w", ErrDamaged)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	// As bbolt's own: pages that another process is writing are inconsistent.
	if err := waitForLock(f, unix.LOCK_SH); err != nil {
		return nil, err
	}
	if err := readThrough(f); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err := boltcheck.Check(f, ErrDamaged); err != nil {
		return nil, err
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: lockWait, PreLoadFreelist: true})
	switch {
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("%w (its lock is held): %w", ErrLocked, err)
	case errors.Is(err, os.ErrPermission):
		return nil, err
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	defer func() { err = errors.Join(err, db.Close()) }()

	tx, err := db.Begin(false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, tx.Rollback()) }()
	return verifyJournal(tx)
}

// readThrough reads a file once, in order, so that a page that the disk cannot read shows here.
// In the memory map, one page after the other would be fetched. Pieces of 8 KiB, as io.Discard takes
// them, took 0.16 s of processor time for 594 MB, those of 1 MiB 0.04 s.
func readThrough(f *os.File) error {
	for piece := make([]byte, 1<<20); ; {
		if _, err := f.Read(piece); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// verifyJournal decodes every entry, and returns those of committed snapshots. A database without a
// journal is whole: it belongs to containerd's own overlay snapshotter, and is upgraded.
func verifyJournal(tx *bolt.Tx) (*entries, error) {
	j, err := journal(tx, 0)
	if errors.Is(err, errNoJournal) {
		return &entries{}, nil
	}
	var known *entries
	if err == nil {
		known, err = j.decodeAll()
	}
	if err == nil {
		err = errors.Join(
			j.EachOpen(func(OpenEntry) error { return nil }),
			j.EachRemoved(func(CommitEntry) error { return nil }),
		)
	}
	if err == nil {
		_, err = j.Run()
	}
	if err == nil {
		_, err = j.Scrub()
	}
	if err != nil && !errors.Is(err, layout.ErrNewer) {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return known, err
}

// ReadOnly runs fn in a read transaction on the database of a root whose daemon is not
// running. Nothing is written. The errors are those of Open.
func ReadOnly(ctx context.Context, root string, fn func(context.Context, *Journal) error) (err error) {
	lock, err := lockRoot(ctx, root, passing)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	path := filepath.Join(root, FileName)
	found, err := verify(path)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	var known atomic.Pointer[entries]
	known.Store(found)
	ms, err := cstorage.NewMetaStore(path, func(o *bolt.Options) error {
		o.ReadOnly, o.Timeout = true, lockWait
		return nil
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ms.Close()) }()
	return view(ctx, ms, 0, &known, fn)
}

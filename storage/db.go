package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"

	cstorage "github.com/containerd/containerd/v2/core/snapshots/storage"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
)

// FileName is the name of the database below the root.
const FileName = "metadata.db"

var (
	// ErrWrite is wrapped by the errors of a transaction whose commit failed.
	// What is on disk is unknown until Rewrite has succeeded.
	ErrWrite = errors.New("metadata.db was not written")
	// ErrBroken is returned by every writable transaction between an ErrWrite
	// and a successful Rewrite.
	ErrBroken = errors.New("metadata.db could not be written and was not yet rewritten")
	// ErrDamaged is wrapped by errors that mean: the content of metadata.db is
	// not what was written.
	ErrDamaged = errors.New("metadata.db is damaged")
	// ErrMissing is returned by Open when there are snapshots but no database.
	ErrMissing = errors.New("metadata.db is missing although there are snapshots")
	// ErrLocked is wrapped by errors that mean: another process has the root.
	ErrLocked = errors.New("in use by another durable-snapshotter")
)

// DB is an opened metadata.db.
type DB struct {
	path string
	keep uint64
	lock *os.File

	// swap is held shared by every transaction and exclusively by Rewrite and
	// Close, which replace or close ms. Lock it before state.
	swap sync.RWMutex
	ms   *cstorage.MetaStore

	state  sync.Mutex // guards broken
	broken error

	known atomic.Pointer[entries] // nil after the first writable transaction

	written   atomic.Int64 // bytes of the file that were written before; see room
	extending atomic.Bool
}

// entries are those of the journal that were decoded to verify them. What reads them all
// next, as recovery does, need not decode them again.
type entries struct {
	committed map[uint64]*CommitEntry
	states    map[uint64]*StateEntry
}

// hook is the context key of BeforeCommit.
type hook struct{}

// BeforeCommit returns a context for one writable transaction: fn runs inside
// it, after everything else and just before its commit, with the journal of the
// transaction. An error of fn rolls everything back.
//
// It exists because containerd's overlay snapshotter starts its transactions
// itself: this is how our journal entries and syncs become part of them.
func BeforeCommit(ctx context.Context, fn func(context.Context, *Journal) error) context.Context {
	return context.WithValue(ctx, hook{}, fn)
}

// TransactionContext starts a transaction that the caller ends. BeforeCommit
// has no effect on it. See containerd's storage.MetaStore.
func (db *DB) TransactionContext(ctx context.Context, writable bool) (context.Context, cstorage.Transactor, error) {
	db.swap.RLock()
	if err := db.usable(writable); err != nil {
		db.swap.RUnlock()
		return ctx, nil, err
	}
	if writable {
		db.known.Store(nil)
	}
	ctx, tx, err := db.ms.TransactionContext(ctx, writable)
	if err != nil {
		db.swap.RUnlock()
		return ctx, nil, err
	}
	return ctx, &transactor{Transactor: tx, db: db}, nil
}

// transactor lets Rewrite and Close wait for a transaction, and notices when
// its commit fails.
type transactor struct {
	cstorage.Transactor
	db   *DB
	once sync.Once
}

func (t *transactor) Commit() error {
	defer t.once.Do(t.db.swap.RUnlock)
	return t.db.commit(t.Transactor)
}

func (t *transactor) Rollback() error {
	defer t.once.Do(t.db.swap.RUnlock)
	return t.Transactor.Rollback()
}

// WithTransaction runs fn in a transaction. A writable one is committed when fn
// and the function given to BeforeCommit return nil; it is durable when
// WithTransaction returns nil. The error wraps ErrWrite when the commit itself
// failed.
//
// A panic inside is returned as an error that wraps ErrDamaged: bbolt panics on
// invalid pages, and reading a page that the disk cannot deliver is
// a fault in the memory map.
func (db *DB) WithTransaction(ctx context.Context, writable bool, fn cstorage.TransactionCallback) (err error) {
	db.swap.RLock()
	defer db.swap.RUnlock()
	if err := db.usable(writable); err != nil {
		return err
	}
	if writable {
		db.known.Store(nil)
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))

	tctx, trans, err := db.ms.TransactionContext(ctx, writable)
	if err != nil {
		return err
	}
	defer func() {
		if p := recover(); p != nil {
			err = errors.Join(fmt.Errorf("%s: %v: %w", db.path, p, ErrDamaged), rollback(trans))
		}
	}()

	if err := fn(tctx); err != nil {
		return errors.Join(err, rollback(trans))
	}
	if !writable {
		return rollback(trans)
	}
	if before, ok := ctx.Value(hook{}).(func(context.Context, *Journal) error); ok {
		j, err := db.journal(trans)
		if err == nil {
			err = before(tctx, j)
		}
		if err != nil {
			return errors.Join(err, rollback(trans))
		}
	}
	return db.commit(trans)
}

// Update runs fn in a writable transaction with the journal.
func (db *DB) Update(ctx context.Context, fn func(context.Context, *Journal) error) error {
	return db.WithTransaction(BeforeCommit(ctx, fn), true, func(context.Context) error { return nil })
}

// View runs fn in a read-only transaction with the journal.
func (db *DB) View(ctx context.Context, fn func(context.Context, *Journal) error) error {
	db.swap.RLock()
	defer db.swap.RUnlock()
	if err := db.usable(false); err != nil {
		return err
	}
	return view(ctx, db.ms, db.keep, &db.known, fn)
}

// view is View without the locks, for Open.
func view(ctx context.Context, ms *cstorage.MetaStore, keep uint64, known *atomic.Pointer[entries], fn func(context.Context, *Journal) error) error {
	return viewBolt(ctx, ms, func(ctx context.Context, tx *bolt.Tx) error {
		j, err := journal(tx, keep)
		if err != nil {
			return err
		}
		// After the transaction has begun: what is written from now on is not in it.
		j.known = known.Load()
		return fn(ctx, j)
	})
}

// viewBolt is view on the bolt level. A fault or a panic in reading is damage.
func viewBolt(ctx context.Context, ms *cstorage.MetaStore, fn func(context.Context, *bolt.Tx) error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	ctx, trans, err := ms.TransactionContext(ctx, false)
	if err != nil {
		return err
	}
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v: %w", p, ErrDamaged)
		}
		err = errors.Join(err, rollback(trans))
	}()
	tx, err := boltTx(trans)
	if err != nil {
		return err
	}
	return fn(ctx, tx)
}

func rollback(t cstorage.Transactor) error {
	// A panic inside Rollback, after one that brought us here, adds nothing.
	defer func() { _ = recover() }()
	if err := t.Rollback(); err != nil && !errors.Is(err, berrors.ErrTxClosed) {
		return fmt.Errorf("roll back: %w", err)
	}
	return nil
}

// boltTx is the seam on which the journal rests: the Transactor of containerd's
// MetaStore is in fact the *bolt.Tx (core/snapshots/storage/metastore.go:125),
// although its documentation does not promise it. TestTransactorIsBoltTx fails
// when an upgrade of containerd changes that.
func boltTx(t cstorage.Transactor) (*bolt.Tx, error) {
	tx, ok := t.(*bolt.Tx)
	if !ok {
		return nil, fmt.Errorf("containerd's transaction is a %T, not a *bolt.Tx: the journal cannot share it", t)
	}
	return tx, nil
}

func (db *DB) journal(t cstorage.Transactor) (*Journal, error) {
	tx, err := boltTx(t)
	if err != nil {
		return nil, err
	}
	return journal(tx, db.keep)
}

// usable must be called with swap held. A broken database is still read: what
// it shows beyond the durable state is at most a transaction that returned an error
// to its caller.
func (db *DB) usable(writable bool) error {
	if db.ms == nil {
		return fmt.Errorf("%s: %w", db.path, os.ErrClosed)
	}
	if !writable {
		return nil
	}
	db.state.Lock()
	defer db.state.Unlock()
	return db.broken
}

// commit commits a writable transaction and decides, when that failed, whether
// another one may follow. bbolt writes the data pages, syncs them, writes the meta
// page and syncs it.
//
// A write that the kernel refused at once, as on a full disk, has changed nothing
// that the state on disk needs. After a failed sync the file cannot be written to
// any more. If it was that of the meta page, readers see the new state, the disk
// has one of the two, and bbolt would build on pages that the disk may still
// need. If it was that of the data pages, ext4 would lose what is written to them
// next (see fromDisk). Then nothing is written before Rewrite, which takes a new
// file.
func (db *DB) commit(t cstorage.Transactor) error {
	tx, err := boltTx(t)
	if err != nil {
		return errors.Join(err, rollback(t))
	}
	id, used := tx.ID(), tx.Size()
	cause := t.Commit()
	if cause == nil {
		db.room(used)
		return nil
	}
	visible := true
	if err := inBolt(context.Background(), db.ms, false, func(tx *bolt.Tx) error {
		visible = tx.ID() >= id
		return nil
	}); err != nil {
		cause = errors.Join(cause, err)
	}
	var refused *os.PathError // bbolt's syncs return a bare errno, or text
	if visible || !errors.As(cause, &refused) || refused.Op != "write" {
		db.state.Lock()
		db.broken = fmt.Errorf("%w: %w", ErrBroken, cause)
		db.state.Unlock()
	}
	return fmt.Errorf("%s: %w: %w", db.path, ErrWrite, cause)
}

// headroom is the disk space that Reserve keeps for the database, in bytes.
const headroom = 1 << 20

// Reserve makes the file system set blocks aside for the growth of the database
// (fallocate(2), without changing its size), so that snapshots can be removed
// from a disk that is full. On btrfs this works because of inPlace; for a quota
// there, which even a write in place needs some of, it keeps a second file, see
// Spend.
func (db *DB) Reserve() error {
	db.swap.RLock()
	defer db.swap.RUnlock()
	f, err := os.OpenFile(db.path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err == nil {
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, st.Size()+headroom)
	}
	return errors.Join(err, f.Close(), db.save())
}

// reserveSuffix is that of the file that Spend gives up.
const reserveSuffix = ".reserve"

// save makes the file that Spend gives up, on btrfs and unless it is there.
func (db *DB) save() error {
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(db.path), &st); err != nil || !isBtrfs(&st) {
		return err
	}
	f, err := os.OpenFile(db.path+reserveSuffix, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	err = errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, headroom), f.Close())
	if err != nil {
		return errors.Join(err, removeIfThere(f.Name()))
	}
	return nil
}

// Spend releases what Reserve keeps for a quota of btrfs that is used up, and reports
// whether there was something: then a transaction that failed may succeed now.
// btrfs credits what is freed when its own transaction ends.
func (db *DB) Spend() bool {
	if os.Remove(db.path+reserveSuffix) != nil {
		return false
	}
	dir, err := os.Open(filepath.Dir(db.path))
	if err != nil {
		return false
	}
	defer dir.Close()
	return unix.Syncfs(int(dir.Fd())) == nil
}

// Release takes the pages of the file out of the resident memory of this process (madvise(2)). They stay
// in the page cache, for the kernel to take back, and the next transaction maps what it reads of them.
// It is for after a pass through all of a large database: bbolt's memory map keeps each page it has read.
func (db *DB) Release(ctx context.Context) error {
	db.swap.RLock()
	defer db.swap.RUnlock()
	if err := db.usable(false); err != nil {
		return err
	}
	return viewBolt(ctx, db.ms, func(_ context.Context, tx *bolt.Tx) error {
		// While a transaction is open bbolt does not replace the map, which has all pages of it.
		start, size := tx.DB().Info().Data, uintptr(tx.Size())
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, start, size, unix.MADV_DONTNEED); errno != 0 {
			return os.NewSyscallError("madvise", errno)
		}
		return nil
	})
}

// Path returns the path of the database file.
func (db *DB) Path() string { return db.path }

// Close waits for the transactions in flight and releases the file and the
// root.
func (db *DB) Close() error {
	db.swap.Lock()
	defer db.swap.Unlock()
	if db.ms == nil {
		return nil
	}
	err := db.ms.Close()
	db.ms = nil
	return errors.Join(err, db.lock.Close())
}

// Broken returns why writable transactions are refused, or nil.
func (db *DB) Broken() error {
	db.state.Lock()
	defer db.state.Unlock()
	return db.broken
}

// Rewrite copies the database, as this process sees it, into a new file, syncs
// it, and puts it in the place of the old one. Success proves that the file
// system accepts writes, and that everything that transactions see from now on
// is durable; this includes a transaction that returned ErrWrite and
// became visible all the same.
func (db *DB) Rewrite(ctx context.Context) error {
	db.swap.Lock()
	defer db.swap.Unlock()
	if db.ms == nil {
		return fmt.Errorf("%s: %w", db.path, os.ErrClosed)
	}
	next := db.path + ".rewrite"
	if err := copyDatabase(ctx, db.ms, next); err != nil {
		return errors.Join(fmt.Errorf("rewrite %s: %w", db.path, err), removeIfThere(next))
	}
	faults.Point(faults.RewriteWritten)
	if _, err := verify(next); err != nil {
		return errors.Join(fmt.Errorf("rewrite %s: %w", db.path, err), removeIfThere(next))
	}
	if err := fsync.Rename(next, db.path); err != nil {
		// The name may be the new one or the old one: both files hold the same
		// state, but only one of them is open here. Leave broken set.
		return fmt.Errorf("rewrite %s: %w", db.path, err)
	}
	faults.Point(faults.RewriteInstalled)
	ms, err := openStore(db.path)
	if err != nil {
		return fmt.Errorf("rewrite %s: %w", db.path, err)
	}
	// The old file has no name any more; an error of its close has no effect.
	_ = db.ms.Close()
	db.ms = ms
	written, _ := writeRoom(ctx, db.ms, db.path, 0)
	db.written.Store(written)
	db.state.Lock()
	db.broken = nil
	db.state.Unlock()
	return nil
}

func copyDatabase(ctx context.Context, ms *cstorage.MetaStore, path string) error {
	return viewBolt(ctx, ms, func(_ context.Context, tx *bolt.Tx) error {
		if err := inPlace(path); err != nil {
			return err
		}
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		if _, err := tx.WriteTo(f); err != nil {
			return errors.Join(fmt.Errorf("write %s: %w", path, err), f.Close())
		}
		if err := f.Sync(); err != nil {
			return errors.Join(fmt.Errorf("fsync %s: %w", path, err), f.Close())
		}
		return f.Close()
	})
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

package gate

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/metrics"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Config of a Gate.
type Config struct {
	Root string // of the snapshotter
	// Dir is the directory of the snapshots, which exists. It may be on another file system than
	// the database, and the errors of its writes are the ones that count.
	Dir string
	// Sync is how SyncApart makes a tree durable. "" is Syncfs.
	Sync fsync.Mode
	// OnHealth is called with an error when the file system stops accepting writes,
	// and with nil when it accepts them again. It must not call back. May be nil.
	OnHealth func(error)
}

// Gate is the writable side of a root. It may be used from many goroutines.
type Gate struct {
	cfg  Config
	db   *storage.DB
	once bool // see OneJournal

	inPlace bool // see InPlace

	apart   chan struct{} // room for one; see "Lock order" in doc.go
	syncing sync.Mutex
	outage  outage
	writers writers
}

// New returns the gate of an opened database. The caller closes the database.
func New(db *storage.DB, cfg Config) *Gate {
	once := (cfg.Sync == fsync.Auto || cfg.Sync == fsync.OwnFiles) && fsync.OneJournal(cfg.Dir)
	return &Gate{
		cfg: cfg, db: db, once: once, inPlace: once && fsync.InPlace(cfg.Dir, cfg.Root),
		apart: make(chan struct{}, 1), writers: writers{open: map[*Writer]struct{}{}},
	}
}

// Undo describes what a failed commit of a transaction may leave: its row may have
// become visible all the same, and is removed then.
type Undo struct {
	Key string // of the row
	ID  uint64 // of its directory, 0 as long as there is none
	// Forget is called first when the transaction fails for any reason. It discards
	// what the process has noted of the row already. May be nil.
	Forget func()
}

// View runs fn in a read-only transaction.
func (g *Gate) View(ctx context.Context, fn func(context.Context, *storage.Journal) error) error {
	return g.db.View(ctx, fn)
}

// Commit makes everything that w has written durable, and runs tx in a transaction,
// which is durable when Commit returns nil. undo may be nil.
//
// ctx is checked after the sync, and never later: a transaction that has begun is not
// canceled. The error is FailedPrecondition when w is poisoned, by a failure before
// the transaction ends.
func (g *Gate) Commit(ctx context.Context, w *Writer, undo *Undo, tx func(context.Context, *storage.Journal) error) error {
	return g.Synced(ctx, w, g.transaction(w, undo, tx))
}

// CommitRest is Commit for a tree that SyncApart has made durable. Instead of everything,
// only what was written since is synced, by rest.
func (g *Gate) CommitRest(ctx context.Context, w *Writer, undo *Undo, rest func() error, tx func(context.Context, *storage.Journal) error) error {
	return g.synced(ctx, w, func() error { return g.Do(ctx, rest) }, g.transaction(w, undo, tx))
}

// transaction runs tx unless w is poisoned.
func (g *Gate) transaction(w *Writer, undo *Undo, tx func(context.Context, *storage.Journal) error) func(context.Context) error {
	return func(ctx context.Context) error {
		// Checked inside the transaction, because a write of another caller that
		// failed while this one waited for the transaction has poisoned w too.
		inTx := func(ctx context.Context, j *storage.Journal) error {
			if err := w.Poisoned(); err != nil {
				return err
			}
			return tx(ctx, j)
		}
		return g.Update(ctx, undo, inTx)
	}
}

// Synced makes everything that w has written durable and then calls fn, with a
// context that is never canceled.
//
// From the sync to the end of fn one caller at a time: if a sync of another caller
// fails in between, its error may be about our pages, although our own sync returned
// before. With this lock it comes before our sync, and w is poisoned, or after our
// answer, when our pages were durable.
func (g *Gate) Synced(ctx context.Context, w *Writer, fn func(context.Context) error) error {
	return g.synced(ctx, w, func() error { return g.sync(ctx, w) }, fn)
}

func (g *Gate) synced(ctx context.Context, w *Writer, sync func() error, fn func(context.Context) error) error {
	g.syncing.Lock()
	defer g.syncing.Unlock()
	if err := sync(); err != nil {
		return err
	}
	if err := w.Poisoned(); err != nil {
		return err
	}
	w.synced()
	// The last instant at which the caller can cancel.
	if err := ctx.Err(); err != nil {
		return err
	}
	return fn(context.WithoutCancel(ctx))
}

// OneJournal reports whether one fsync is to be relied on to be one of all that was done before
// on the file system: it has one journal, and the configuration allows it.
func (g *Gate) OneJournal() bool { return g.once }

// InPlace reports whether what is overwritten in place below snapshots/, and written out, is on stable storage when
// the transaction after it is, because that flushes the cache of the same disk; and the configuration allows to rely on it.
func (g *Gate) InPlace() bool { return g.inPlace }

// Files returns what collects the files of a tree for SyncApart, or nil where only
// everything on the file system can be synced.
func (g *Gate) Files() *fsync.Files {
	if !g.OneJournal() {
		return nil
	}
	return fsync.NewFiles(g.cfg.Dir)
}

// SyncAhead has the kernel write what w has written so far, while the caller does other work, so that
// SyncApart, which must follow, finds less: the files, where they are to be synced alone, else the
// file system, unless another sync is under way, which writes the same. SyncApart fails if it does.
func (g *Gate) SyncAhead(ctx context.Context, w *Writer, files *fsync.Files) {
	if files.Complete() && (g.cfg.Sync == fsync.OwnFiles || files.Others()) {
		files.Begin()
		return
	}
	select {
	case g.apart <- struct{}{}:
	default:
		return
	}
	go func() {
		defer func() { <-g.apart }()
		_ = g.sync(context.WithoutCancel(ctx), w) // SyncApart finds that w is poisoned
	}()
}

const (
	// much is how many bytes another program writes before a sync is begun while it writes more.
	much = 32 << 20
	// enough is how many are worth a sync beside the walk of a Commit, which takes a flush of the
	// disk's cache more.
	enough = 2 << 20
)

// Grown notes that another program has written so many bytes more of w, and begins a sync when there is
// much that none has been begun for, so that the sync of the Commit, in containerd's lock, finds less.
// It does nothing while others have more to be written than w had, which that sync would wait for, too.
func (g *Gate) Grown(ctx context.Context, w *Writer, bytes int64) {
	w.all.Add(bytes)
	w.grown.Add(bytes)
	g.ahead(ctx, w, much)
}

// CommitAhead is Grown before the walk of a Commit, for what is left. Commit must follow.
func (g *Gate) CommitAhead(ctx context.Context, w *Writer) { g.ahead(ctx, w, enough) }

func (g *Gate) ahead(ctx context.Context, w *Writer, least int64) {
	if n := w.grown.Load(); n >= least && !fsync.Others(w.all.Load()) {
		w.grown.Add(-n)
		g.SyncAhead(ctx, w, nil)
	}
}

// SyncApart makes everything that w has written durable. It is for the heavy part of
// the work: no Commit waits for it. Commit, CommitRest or Synced must follow. files, which
// may be nil, are all regular files that w has written; SyncApart closes them.
//
// The error of a sync beside this one may be about our pages, see Synced. All of them have
// ended, and w is poisoned by those that have failed, when all locks were held. Syncs of
// files alone take no lock: what they fail over is in those files, or the journal, which
// the Commit writes to.
//
// It ends with ctx; the sync itself, which nothing can end, goes on.
func (g *Gate) SyncApart(ctx context.Context, w *Writer, files *fsync.Files) error {
	// A Remove waits for an Apply that it has ended, and containerd, in its lock, for Remove.
	synced := make(chan error, 1)
	go func() {
		defer files.Close()
		synced <- g.syncApart(ctx, w, files)
	}()
	select {
	case err := <-synced:
		if err != nil {
			return err
		}
	case <-ctx.Done():
		return ctx.Err()
	}
	g.syncing.Lock()
	defer g.syncing.Unlock()
	return w.Poisoned()
}

func (g *Gate) syncApart(ctx context.Context, w *Writer, files *fsync.Files) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if done, err := g.syncFiles(context.WithoutCancel(ctx), files); done || err != nil {
		return err
	}
	// One at a time: what the first has written, the second need not.
	select {
	case g.apart <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-g.apart }()
	metrics.ApplySyncs.WithLabelValues(string(fsync.Syncfs)).Inc()
	return g.sync(context.WithoutCancel(ctx), w)
}

// syncFiles syncs files alone, if they are all that is to be synced and it is better.
func (g *Gate) syncFiles(ctx context.Context, files *fsync.Files) (done bool, err error) {
	if !files.Complete() {
		return false, nil
	}
	err = g.Do(ctx, func() error {
		if g.cfg.Sync != fsync.OwnFiles {
			if busy, err := files.Busy(); !busy || err != nil {
				return err
			}
		}
		err := files.Sync()
		done = err == nil
		return err
	})
	if err != nil && !IsWriteFailure(err) {
		log.G(ctx).WithError(err).Warn("files cannot be synced alone: the file system is synced")
		err = nil
	}
	if done {
		metrics.ApplySyncs.WithLabelValues(string(fsync.OwnFiles)).Inc()
	}
	return done, err
}

func (g *Gate) sync(ctx context.Context, w *Writer) error {
	return g.Do(ctx, w.cursor.Sync)
}

// Update runs tx in a transaction, which is durable when Update returns nil. It does
// not end with ctx. undo may be nil.
func (g *Gate) Update(ctx context.Context, undo *Undo, tx func(context.Context, *storage.Journal) error) error {
	ctx = context.WithoutCancel(ctx)
	return g.DoUndo(ctx, undo, func() error { return g.db.Update(ctx, tx) })
}

// Do calls write, which writes and syncs something, or has containerd's snapshotter
// run a transaction.
func (g *Gate) Do(ctx context.Context, write func() error) error {
	return g.DoUndo(ctx, nil, write)
}

// DoUndo is Do for a write that ends with a transaction. write may fill in undo.
func (g *Gate) DoUndo(ctx context.Context, undo *Undo, write func() error) error {
	err := write()
	if err == nil {
		return nil
	}
	if undo != nil && undo.Forget != nil {
		undo.Forget()
	}
	if !IsWriteFailure(err) || errors.As(err, new(*finalError)) {
		return err
	}
	g.fail(ctx, err, undo)
	return &finalError{err}
}

// finalError is a failed write that was handled: an outer Do must not handle it again.
type finalError struct{ error }

func (e *finalError) Unwrap() error { return e.error }

// IsWriteFailure reports whether an error means that the kernel could not write
// something: a sync or the commit of a transaction. Any other error, for example a
// missing parent or no space for a new directory, concerns its own operation only.
func IsWriteFailure(err error) bool {
	var sync *fsync.Error
	return errors.As(err, &sync) || errors.Is(err, storage.ErrWrite)
}

// Open returns nil when writes are accepted. After a failed one it probes, at most
// once a second, and returns Unavailable as long as that fails. Call it before
// anything that writes.
func (g *Gate) Open(ctx context.Context) error {
	if cause := g.current(ctx); cause != nil {
		return fmt.Errorf("the file system of %s does not accept writes: %v: %w", g.cfg.Root, cause, errdefs.ErrUnavailable)
	}
	return nil
}

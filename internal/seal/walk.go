package seal

import (
	"context"
	"errors"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/idle"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
)

// A Change may change an entry of the tree on disk before it is counted and sealed: then
// it returns true, and the entry is read again. It gets the entry with all extended
// attributes, also those that are not recorded. It is called for the root first, and for
// directories one after another, each before anything that is in it. For everything else
// it is called from several goroutines.
type Change func(ctx context.Context, path string, e *Entry) (changed bool, err error)

// walk visits a tree and calls fn in the order of a seal: fn gets runs of entries,
// without their extended attributes, together with their lines. Entries
// are read by several workers; fn is called from one goroutine. A walk that
// meets a mount point ends with tree.ErrMounted, one that meets an entry of more than
// MaxEntry bytes with mtree.ErrTooLarge.
func walk(ctx context.Context, root string, change Change, fn func(entries []Entry, lines []byte) error) error {
	w := walker{change: change, attrs: attributes{all: change != nil, limit: MaxEntry}}
	return w.walk(ctx, root, fn)
}

// walker reads entries. Its memory is bounded, whatever is in the tree: by the
// number of entries in a batch and of batches, by heldLimit for their lines, by
// largeEntries for attributes, and by namesLimit for names.
type walker struct {
	idle   bool // its goroutines read at idle I/O priority
	change Change
	attrs  attributes
	tree   *tree.Tree // at root

	held  atomic.Int64  // bytes of lines that fn has not got yet
	freed chan struct{} // fn got some
	large chan struct{} // holds a token for each large entry that is being read
}

const (
	batchSize = 256
	// ahead bounds the batches that wait for their turn.
	ahead = 16

	// readers is how many entries are read at a time at least: from a cold disk, reading is
	// waiting, mostly.
	readers = 4

	heldLimit = 16 << 20
	runBytes  = 1 << 20 // of lines that fn gets at a time, about

	// largeEntry is more than the attributes of an entry usually take.
	largeEntry   = 256 << 10
	largeEntries = 2
)

// batch is a run of entries in order, handed to one worker.
type batch struct {
	w       *walker
	entries []Entry  // with a Path only, or complete for directories
	ready   [][]byte // the lines of those that are complete
	next    int      // the first entry whose line is not in lines
	lines   []byte
	err     error
	done    chan struct{}
}

func (w *walker) run(fn func() error) error {
	if w.idle {
		return idle.Run(fn)
	}
	return fn()
}

func (w *walker) walk(ctx context.Context, root string, fn func(entries []Entry, lines []byte) error) (err error) {
	if w.tree, err = tree.Open(root); err != nil {
		return err
	}
	defer w.tree.Close()
	w.freed, w.large = make(chan struct{}, 1), make(chan struct{}, largeEntries)
	ctx, stop := context.WithCancel(ctx)
	var (
		running sync.WaitGroup
		work    = make(chan *batch, ahead)
		order   = make(chan *batch, ahead)
		walkErr error
	)
	defer func() {
		stop()
		running.Wait()
	}()
	running.Go(func() {
		defer close(order)
		defer close(work)
		l := batcher{ctx: ctx, w: w, send: func(b *batch) error {
			// order first: nothing waits for a batch that no worker gets.
			for _, c := range []chan *batch{order, work} {
				select {
				case c <- b:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			return nil
		}}
		walkErr = w.run(l.run)
	})
	for range max(readers, runtime.GOMAXPROCS(0)) {
		running.Go(func() {
			for b := range work {
				b.err = w.run(func() error { return b.run(ctx, false) })
				close(b.done)
			}
		})
	}
	for b := range order {
		select {
		case <-b.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		if b.err != nil {
			return b.err
		}
		if err := w.finish(ctx, b, fn); err != nil {
			return err
		}
	}
	return walkErr
}

// finish hands a batch to fn, and reads what its worker has left.
func (w *walker) finish(ctx context.Context, b *batch, fn func(entries []Entry, lines []byte) error) error {
	for first := 0; ; {
		if b.next > first {
			if err := fn(b.entries[first:b.next], b.lines); err != nil {
				return err
			}
			w.held.Add(-int64(len(b.lines)))
			select {
			case w.freed <- struct{}{}:
			default:
			}
			first, b.lines = b.next, nil
		}
		if first == len(b.entries) {
			return nil
		}
		if err := w.run(func() error { return b.run(ctx, true) }); err != nil {
			return err
		}
	}
}

// run reads the entries of a batch. A worker leaves the rest of it when too much
// is waiting already; it does not wait itself, as all may wait for this batch.
// When it is its turn, the rest is read in pieces.
func (b *batch) run(ctx context.Context, turn bool) error {
	for ; b.next < len(b.entries); b.next++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		if turn && len(b.lines) >= runBytes || !turn && b.w.held.Load() > heldLimit {
			return nil
		}
		if line := b.ready[b.next]; line != nil {
			b.lines, b.ready[b.next] = append(b.lines, line...), nil
			continue
		}
		before := len(b.lines)
		e, lines, err := b.w.read(ctx, b.entries[b.next].Path, b.lines)
		if err != nil {
			return err
		}
		b.entries[b.next], b.lines = e, lines
		b.w.held.Add(int64(len(lines) - before))
	}
	return nil
}

// read reads an entry, has it changed, and appends its line.
func (w *walker) read(ctx context.Context, rel string, lines []byte) (e Entry, _ []byte, err error) {
	e, err = w.entry(rel, min(largeEntry, w.attrs.limit))
	if errors.Is(err, mtree.ErrTooLarge) {
		select {
		case w.large <- struct{}{}:
		case <-ctx.Done():
			return e, nil, ctx.Err()
		}
		defer func() { <-w.large }()
		e, err = w.entry(rel, w.attrs.limit)
	}
	if err == nil && w.change != nil {
		var changed bool
		if changed, err = w.change(ctx, w.tree.Path(rel), &e); changed && err == nil {
			e, err = w.entry(rel, w.attrs.limit)
		}
	}
	if err != nil {
		return e, nil, err
	}
	start := len(lines)
	if lines = e.appendLine(lines); len(lines)-start > mtree.MaxLine {
		return e, nil, tooLarge(w.tree.Path(rel), w.attrs.limit)
	}
	e.Xattrs = nil
	return e, lines, nil
}

// entry is Read within the tree's own mount.
func (w *walker) entry(rel string, limit int) (Entry, error) {
	e := Entry{Path: rel}
	var err error
	if e.Stat, err = w.tree.Lstat(rel); err != nil {
		return e, err
	}
	path := w.tree.Path(rel)
	if e.Type() == unix.S_IFLNK {
		if e.Link, err = os.Readlink(path); err != nil {
			return e, err
		}
	}
	attrs := w.attrs
	attrs.limit = limit
	e.Xattrs, err = attrs.read(path)
	return e, err
}

// batcher makes batches of the entries that a walk through the directories visits.
type batcher struct {
	ctx   context.Context
	w     *walker
	send  func(*batch) error
	batch *batch
}

func (b *batcher) run() error {
	err := b.w.tree.Walk(b.ctx, b.dir, func(rel string) error { return b.add(Entry{Path: rel}, nil) })
	if err == nil {
		err = b.flush()
	}
	return err
}

func (b *batcher) flush() error {
	full := b.batch
	if full == nil {
		return nil
	}
	b.batch = nil
	return b.send(full)
}

func (b *batcher) add(e Entry, line []byte) error {
	if b.batch == nil {
		b.batch = &batch{w: b.w, done: make(chan struct{})}
	}
	b.batch.entries, b.batch.ready = append(b.batch.entries, e), append(b.batch.ready, line)
	if len(b.batch.entries) == batchSize {
		return b.flush()
	}
	return nil
}

// dir adds a directory, or anything of which the type is not known yet.
func (b *batcher) dir(rel string) (dir bool, err error) {
	w := b.w
	// The lines of directories wait too, and nothing but what was sent goes on.
	for w.held.Load() > heldLimit {
		if err := b.flush(); err != nil {
			return false, err
		}
		select {
		case <-w.freed:
		case <-b.ctx.Done():
			return false, b.ctx.Err()
		}
	}
	e, line, err := w.read(b.ctx, rel, nil)
	if err != nil {
		return false, err
	}
	w.held.Add(int64(len(line)))
	return e.Type() == unix.S_IFDIR, b.add(e, line)
}

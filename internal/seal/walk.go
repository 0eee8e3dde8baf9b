package seal

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// A Hook sees every entry before it is counted, and may change it on disk: then
// it returns true, and the entry is read again. It is called for the root
// first, and for directories one after another, each before anything that is in
// it. For everything else it is called from several goroutines.
type Hook func(ctx context.Context, path string, e *Entry) (changed bool, err error)

// batch is a run of entries in order, handed to one worker.
type batch struct {
	root    string
	hook    Hook
	entries []Entry // with a Path only, or complete for directories
	read    []bool  // which of them are complete
	lines   []byte
	err     error
	done    chan struct{}
}

const (
	batchSize = 256
	// ahead bounds the batches that wait for their turn, and with them memory.
	ahead = 16
)

// Walk visits a tree and hands it over in the order of a seal: fn gets entries
// together with their lines, in runs. Entries are looked at by several workers;
// fn is called from one goroutine.
func Walk(ctx context.Context, root string, hook Hook, fn func(entries []Entry, lines []byte) error) error {
	return walk(ctx, root, hook, Reading{}, fn)
}

// walk is Walk; with how.Idle its goroutines read at idle I/O priority.
func walk(ctx context.Context, root string, hook Hook, how Reading, fn func(entries []Entry, lines []byte) error) error {
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
		w := lister{ctx: ctx, root: root, hook: hook, send: func(b *batch) error {
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
		walkErr = how.run(w.run)
	})
	for range runtime.GOMAXPROCS(0) {
		running.Go(func() {
			for b := range work {
				b.err = how.run(func() error { return b.run(ctx) })
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
		if err := fn(b.entries, b.lines); err != nil {
			return err
		}
	}
	return walkErr
}

// run looks at the entries of a batch.
func (b *batch) run(ctx context.Context) (err error) {
	for i := range b.entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		e := &b.entries[i]
		if !b.read[i] {
			if *e, err = readHooked(ctx, filepath.Join(b.root, e.Path), e.Path, b.hook); err != nil {
				return err
			}
		}
		b.lines = e.appendLine(b.lines)
	}
	return nil
}

func readHooked(ctx context.Context, path, rel string, hook Hook) (Entry, error) {
	e, err := Read(path, rel)
	if err != nil || hook == nil {
		return e, err
	}
	changed, err := hook(ctx, path, &e)
	if err != nil || !changed {
		return e, err
	}
	return Read(path, rel)
}

// lister walks through the directories, in order, and makes batches.
type lister struct {
	ctx   context.Context
	root  string
	hook  Hook
	send  func(*batch) error
	batch *batch
}

func (l *lister) run() error {
	err := l.dir(".")
	if err == nil && l.batch != nil {
		err = l.send(l.batch)
	}
	return err
}

func (l *lister) add(e Entry, read bool) error {
	if l.batch == nil {
		l.batch = &batch{root: l.root, hook: l.hook, done: make(chan struct{})}
	}
	b := l.batch
	b.entries, b.read = append(b.entries, e), append(b.read, read)
	if len(b.entries) < batchSize {
		return nil
	}
	l.batch = nil
	return l.send(b)
}

func (l *lister) dir(rel string) error {
	path := filepath.Join(l.root, rel)
	e, err := readHooked(l.ctx, path, rel, l.hook)
	if err != nil {
		return err
	}
	if err := l.add(e, true); err != nil || e.Type() != unix.S_IFDIR {
		return err
	}
	names, err := os.ReadDir(path) // sorted
	if err != nil {
		return err
	}
	for _, n := range names {
		child := n.Name()
		if rel != "." {
			child = rel + "/" + child
		}
		if n.IsDir() {
			err = l.dir(child)
		} else {
			err = l.add(Entry{Path: child}, false)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

package gate

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
)

// Writer is a tree that is being written and may be committed. Open it before the
// first byte: its cursor reports no error of a time before that.
type Writer struct {
	gate   *Gate
	cursor *fsync.Cursor
	id     uint64 // of the open journal entry that a failure marks, 0 when there is none

	poisoned error // guarded by writers.mu

	// Bytes that another program has written, as far as it was seen.
	all   atomic.Int64
	grown atomic.Int64 // since a sync ahead was begun
}

// writers are the open Writers.
type writers struct {
	mu   sync.Mutex
	open map[*Writer]struct{}
}

// OpenWriter returns a Writer for what is written below dir. id is that of its open
// journal entry, which a failed write marks, or 0 for the tree of a heal, which has none.
func (g *Gate) OpenWriter(dir string, id uint64) (*Writer, error) {
	cursor, err := fsync.OpenCursor(dir)
	if err != nil {
		return nil, err
	}
	w := &Writer{gate: g, cursor: cursor, id: id}
	g.writers.mu.Lock()
	defer g.writers.mu.Unlock()
	g.writers.open[w] = struct{}{}
	return w, nil
}

// synced is called right after the sync. The names of the kill points are arguments here
// and not values of a field, so that they are not in a release binary.
func (w *Writer) synced() {
	if w.id == 0 {
		faults.Point(faults.HealSynced)
	} else {
		faults.Point(faults.CommitSynced)
	}
}

// Close releases the Writer. Closing twice is harmless; no data can be lost.
func (w *Writer) Close() error {
	s := &w.gate.writers
	s.mu.Lock()
	delete(s.open, w)
	s.mu.Unlock()
	return w.cursor.Close()
}

// Poison ensures that a Writer can never be committed. The first reason stays.
func (w *Writer) Poison(why error) {
	s := &w.gate.writers
	s.mu.Lock()
	defer s.mu.Unlock()
	if w.poisoned == nil {
		w.poisoned = why
	}
}

// Poisoned returns why a Writer can never be committed, as FailedPrecondition, or nil.
func (w *Writer) Poisoned() error {
	s := &w.gate.writers
	s.mu.Lock()
	defer s.mu.Unlock()
	if w.poisoned == nil {
		return nil
	}
	// Its cause was handled when it happened: a transaction that is refused for it must
	// not poison what was begun since.
	return fmt.Errorf("%w; extract again: %w", &finalError{w.poisoned}, errdefs.ErrFailedPrecondition)
}

// poison poisons all open Writers that are not poisoned yet. It returns the ids of those
// that have one, and their number.
func (s *writers) poison(cause error) (ids []uint64, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.open {
		if w.poisoned != nil {
			continue
		}
		w.poisoned = cause
		if n++; w.id != 0 {
			ids = append(ids, w.id)
		}
	}
	return ids, n
}

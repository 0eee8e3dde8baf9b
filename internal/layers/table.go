package layers

import (
	"cmp"
	"fmt"
	"iter"
	"slices"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/brake"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/recorded"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// table is what this process knows of committed snapshots. The journal has
// what must outlive it: see package recorded.
type table struct {
	mu        sync.Mutex // innermost: nothing else is locked under it
	layers    map[string]*layer
	epoch     uint64                        // of this boot
	order     uint64                        // verifications begun by this process
	pending   map[uint64]storage.StateEntry // states that the journal does not have yet
	flushSoon chan struct{}                 // wakes watch to write them
	brake     *brake.Brake

	root    layout.Root
	onReady func(storage.CommitEntry) // may be nil
}

func newTable(root layout.Root, onBrake func(string), onReady func(storage.CommitEntry)) *table {
	t := &table{
		layers: map[string]*layer{}, pending: map[uint64]storage.StateEntry{}, flushSoon: make(chan struct{}, 1),
		root: root, onReady: onReady,
	}
	t.brake = brake.New(root, (*all)(t), onBrake)
	return t
}

// all are the layers as the brake sees them. table.mu must be held.
type all table

func (a *all) Len() int { return len(a.layers) }

func (a *all) IDs() iter.Seq[uint64] {
	return func(yield func(uint64) bool) {
		for _, l := range a.layers {
			if !yield(l.entry.ID) {
				return
			}
		}
	}
}

func (a *all) Damaged() bool {
	for _, l := range a.layers {
		if l.state.State != storage.StateReady && l.state.State != storage.StateUnverified {
			return true
		}
	}
	return false
}

// add makes a committed snapshot known.
func (t *table) add(e storage.CommitEntry, s storage.StateEntry) *layer {
	e = recorded.Identified(e)
	l := &layer{entry: e, state: recorded.Judge(t.epoch, e, s)}
	t.mu.Lock()
	l.entry.ChainID = recorded.ChainID(e, t.find)
	t.layers[e.Name] = l
	if l.state.State == storage.StateDamaged {
		t.brake.Found(l.entry.ID, l.state.Findings)
	}
	t.mu.Unlock()
	return l
}

// find returns the entry of a committed name. t.mu is held.
func (t *table) find(name string) (storage.CommitEntry, bool) {
	if l := t.layers[name]; l != nil {
		return l.entry, true
	}
	return storage.CommitEntry{}, false
}

// Drop forgets a committed snapshot that is no more. Another may have its name now, under another id.
func (t *table) Drop(name string, id uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l := t.layers[name]; l != nil && l.entry.ID == id {
		t.brake.Cleared(l.entry.ID)
		delete(t.layers, name)
	}
	delete(t.pending, id)
}

// get returns what is known of a committed name, nil when it is nothing.
func (t *table) get(name string) *layer {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.layers[name]
}

// chain returns a committed snapshot and what is below it, the base first.
func (t *table) chain(name string) (chain []*layer, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for name != "" {
		l := t.layers[name]
		if l == nil {
			return nil, fmt.Errorf("committed snapshot %q is not known yet: %w", name, errdefs.ErrUnavailable)
		}
		chain = append(chain, l)
		name = l.entry.Parent
	}
	slices.Reverse(chain)
	return chain, nil
}

// layer returns what is known of the snapshot of a journal entry, nil when it was removed.
func (t *table) layer(e storage.CommitEntry) *layer {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l := t.layers[e.Name]; l != nil && l.entry.Ref().SameLayer(e.Ref()) {
		return l
	}
	return nil
}

// current is the state of a layer and its entry.
func (t *table) current(l *layer) (storage.State, storage.CommitEntry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return l.state.State, l.entry
}

// in returns the committed snapshots in one of the states that can be verified, newest first.
func (t *table) in(states ...storage.State) []string {
	type committed struct {
		sequence uint64
		name     string
	}
	t.mu.Lock()
	found := make([]committed, 0, len(t.layers))
	for _, l := range t.layers {
		if slices.Contains(states, l.state.State) && (l.entry.Digest != "" || l.state.State == storage.StateDamaged) {
			found = append(found, committed{l.entry.Sequence, l.entry.Name})
		}
	}
	t.mu.Unlock() // the rest takes long
	slices.SortFunc(found, func(a, b committed) int { return cmp.Compare(b.sequence, a.sequence) })
	names := make([]string, len(found))
	for i, c := range found {
		names[i] = c.name
	}
	return names
}

// above returns the layers that stand on others, at any height, in the order of their commits, parents first.
func (t *table) above(on func(*layer) bool) (layers []*layer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, l := range t.layers {
		for p := t.layers[l.entry.Parent]; p != nil; p = t.layers[p.entry.Parent] {
			if on(p) {
				layers = append(layers, l)
				break
			}
		}
	}
	slices.SortFunc(layers, func(a, b *layer) int { return cmp.Compare(a.entry.Sequence, b.entry.Sequence) })
	return layers
}

// Sealed returns the layers that have seals, with ids from first on, in their order.
func (t *table) Sealed(first uint64) (entries []storage.CommitEntry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, l := range t.layers {
		if l.entry.ID >= first && l.entry.Digest != "" {
			entries = append(entries, l.entry)
		}
	}
	slices.SortFunc(entries, func(a, b storage.CommitEntry) int { return int(int64(a.ID) - int64(b.ID)) })
	return entries
}

// Knows reports whether a committed snapshot has name.
func (t *table) Knows(name string) bool { return t.get(name) != nil }

// Epoch is the number of the epoch that a layer belongs to that is committed now.
func (t *table) Epoch() uint64 { return t.epoch }

// Brake is why damaged layers are not mended until an operator decides, "" when they are.
func (t *table) Brake() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.brake.Reason()
}

// Update replaces, in the results of journal entries, what this process knows better.
func (t *table) Update(results []verify.Result, entries []storage.CommitEntry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, e := range entries {
		if l := t.layers[e.Name]; l != nil && l.entry.Ref().SameLayer(e.Ref()) {
			results[i] = verify.Known(l.entry, l.state)
		}
	}
}

// Added is a layer that Add made known.
type Added struct {
	t      *table
	entry  storage.CommitEntry
	before *layer // what was known under its name, nil when it was nothing
}

// Add makes a layer known that is being committed, before its row can be seen.
func (t *table) Add(e storage.CommitEntry) *Added {
	a := &Added{t, e, t.get(e.Name)}
	t.add(e, storage.StateEntry{})
	return a
}

// TakeBack undoes Add after its transaction has failed.
func (a *Added) TakeBack() {
	a.t.Drop(a.entry.Name, a.entry.ID)
	a.t.mu.Lock()
	defer a.t.mu.Unlock()
	if a.before != nil && a.t.layers[a.entry.Name] == nil {
		a.t.layers[a.entry.Name] = a.before
	}
}

// Replaces is called when the transaction has removed the snapshot that had the name.
func (a *Added) Replaces() {
	a.t.mu.Lock()
	defer a.t.mu.Unlock()
	if a.before != nil {
		a.t.brake.Cleared(a.before.entry.ID)
	}
}

// discardPending drops the state of a layer that the journal does not have yet.
func (t *table) discardPending(id uint64) {
	t.mu.Lock()
	delete(t.pending, id)
	t.mu.Unlock()
}

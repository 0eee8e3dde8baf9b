package snapshotter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// patience is how long a question without a deadline waits for a look or a
// healing. containerd asks so when it starts, about one image after another, and
// serves nobody before it has the answers.
const patience = 2 * time.Minute

// healAgain is how long an answer that a layer cannot be healed holds.
const healAgain = 10 * time.Second

// readiness is what this process knows of committed snapshots. The journal has
// what must outlive it: see judge.
type readiness struct {
	mu     sync.Mutex // innermost: nothing else is locked under it
	layers map[string]*layer
	epoch  uint64                        // of this boot
	unsaid map[uint64]storage.StateEntry // states that the journal does not have yet
	saying sync.Mutex                    // held while states are written; outside mu
	looks  chan struct{}                 // bounds the layers that are looked at, at a time
	heals  chan struct{}                 // and those that are extracted
}

// layer is one committed snapshot. Its fields are guarded by readiness.mu.
type layer struct {
	entry   storage.CommitEntry
	state   storage.StateEntry
	work    *work     // the look, or the healing, in flight
	tried   time.Time // when healing has failed last
	noBlob  bool      // and it was because there is no good blob
	refused bool      // somebody was told that it is not ready
}

// work is waited for by everybody who asks about a layer.
type work struct{ done chan struct{} }

func newReadiness() readiness {
	return readiness{
		layers: map[string]*layer{}, unsaid: map[uint64]storage.StateEntry{},
		looks: make(chan struct{}, 2), heals: make(chan struct{}, 1),
	}
}

// judge decides what is known of a committed snapshot when the daemon starts,
// out of what the journal says.
func (r *readiness) judge(e storage.CommitEntry, s storage.StateEntry) storage.StateEntry {
	s.ID = e.ID
	switch {
	case s.State == storage.StateDamaged, s.State == storage.StateHealing:
		s.State = storage.StateDamaged
	case e.Digest == "":
		s.State, s.Reason = storage.StateUnverified, neverSealed(e)
	case e.Epoch == r.epoch, s.State == storage.StateReady && s.Epoch == r.epoch, faults.Mutant("answer-before-look"):
		s.State = storage.StateReady
	default:
		s.State = storage.StateUnverified
	}
	return s
}

func neverSealed(e storage.CommitEntry) string {
	return fmt.Sprintf("never sealed: committed with strategy %q", e.Strategy)
}

// add makes a committed snapshot known.
func (r *readiness) add(e storage.CommitEntry, s storage.StateEntry) *layer {
	e = identified(e)
	l := &layer{entry: e, state: r.judge(e, s)}
	r.mu.Lock()
	r.layers[e.Name] = l
	r.mu.Unlock()
	return l
}

// drop forgets a committed snapshot that is no more.
func (r *readiness) drop(name string) {
	r.mu.Lock()
	if l := r.layers[name]; l != nil {
		delete(r.unsaid, l.entry.ID)
	}
	delete(r.layers, name)
	r.mu.Unlock()
}

// chain returns a committed snapshot and what is below it, the base first.
func (r *readiness) chain(name string) (chain []*layer, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for name != "" {
		l := r.layers[name]
		if l == nil {
			return nil, fmt.Errorf("committed snapshot %q is not known yet: %w", name, errdefs.ErrUnavailable)
		}
		chain = append(chain, l)
		name = l.entry.Parent
	}
	slices.Reverse(chain)
	return chain, nil
}

// ask is whole for somebody who waits for the answer.
func (s *Snapshotter) ask(ctx context.Context, name string, topOnly bool) error {
	if _, bounded := ctx.Deadline(); !bounded {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, patience)
		defer stop()
	}
	return s.whole(ctx, name, topOnly)
}

// whole returns nil when a committed snapshot and all below it are whole (I2).
// What is unverified is looked at first, what is damaged is healed, the base
// first, as long as ctx lasts; the work goes on when ctx has ended.
//
// Of layers that are known to be ready nothing is read but an lstat: of each, or
// with topOnly of the snapshot itself.
func (s *Snapshotter) whole(ctx context.Context, name string, topOnly bool) error {
	chain, err := s.ready.chain(name)
	if err != nil {
		return err
	}
	for i, l := range chain {
		if !topOnly || i == len(chain)-1 {
			s.lookForRoot(ctx, l)
		}
		if err := s.wholeLayer(ctx, l); err != nil {
			return err
		}
	}
	return nil
}

// known is whole without the looking, for Commit, in which containerd holds its
// lock.
func (s *Snapshotter) known(name string) error {
	chain, err := s.ready.chain(name)
	if err != nil {
		return err
	}
	s.ready.mu.Lock()
	defer s.ready.mu.Unlock()
	for _, l := range chain {
		if err := s.ready.answer(l); err != nil {
			return err
		}
	}
	return nil
}

// lookForRoot notices a layer whose directory somebody has removed or replaced.
func (s *Snapshotter) lookForRoot(ctx context.Context, l *layer) {
	s.ready.mu.Lock()
	known, id := l.state.State == storage.StateDamaged || l.work != nil, l.entry.ID
	s.ready.mu.Unlock()
	if known {
		return
	}
	f, damaged := rootFinding(filepath.Join(s.dir(id), "fs"))
	if !damaged {
		return
	}
	s.ready.mu.Lock()
	if l.work == nil {
		s.setState(ctx, l, CheckResult{State: storage.StateDamaged, Findings: []seal.Finding{f}})
	}
	s.ready.mu.Unlock()
}

// rootFinding is what one lstat tells of a layer that has no tree any more.
func rootFinding(tree string) (f seal.Finding, damaged bool) {
	st, err := os.Lstat(tree)
	switch {
	case err == nil:
		return seal.Finding{Path: ".", What: "type", Want: "dir", Have: st.Mode().Type().String()}, !st.IsDir()
	case isNotExist(err), errors.Is(err, unix.ENOTDIR):
		return seal.Finding{Path: ".", What: "missing"}, true
	}
	// Nothing about the layer: an xfs that has shut itself down says EIO of all.
	return seal.Finding{}, false
}

// wholeLayer is whole for one layer, whatever its parents are. It is not healed
// while one of them is not whole.
func (s *Snapshotter) wholeLayer(ctx context.Context, l *layer) error {
	r := &s.ready
	r.mu.Lock()
	defer r.mu.Unlock()
	if l.work == nil && r.settled(l) {
		return r.refuse(l, r.answer(l))
	}
	if s.background.Err() != nil {
		return fmt.Errorf("%s: the daemon is stopping: %w", l.describe(), errdefs.ErrUnavailable)
	}
	if l.work == nil {
		l.work = &work{done: make(chan struct{})}
		s.running.Go(func() { s.attend(l) })
	}
	w := l.work
	r.mu.Unlock()
	select {
	case <-w.done:
	case <-ctx.Done():
	}
	r.mu.Lock()
	if l.work == w {
		return r.refuse(l, fmt.Errorf("%s is being looked at or healed: %w: %w", l.describe(), ctx.Err(), errdefs.ErrUnavailable))
	}
	return r.refuse(l, r.answer(l))
}

// refuse remembers that somebody got an error as the answer about a layer.
func (r *readiness) refuse(l *layer, err error) error {
	l.refused = l.refused || err != nil
	return err
}

// settled reports whether a layer can be answered for without work.
func (r *readiness) settled(l *layer) bool {
	switch l.state.State {
	case storage.StateReady:
		return true
	case storage.StateDamaged:
		return time.Since(l.tried) < healAgain
	}
	return l.entry.Digest == ""
}

// answer is nil for a layer of which nothing bad is known. One that was never
// sealed was committed by another snapshotter, and nobody can look at it.
func (r *readiness) answer(l *layer) error {
	switch {
	case l.state.State == storage.StateReady, l.state.State == storage.StateUnverified && l.entry.Digest == "":
		return nil
	case l.state.State == storage.StateDamaged:
		return l.damaged()
	}
	return fmt.Errorf("%s could not be looked at: %s: %w", l.describe(), l.state.Reason, errdefs.ErrUnavailable)
}

func (l *layer) describe() string {
	return fmt.Sprintf("layer %s (snapshots/%d)", cmp.Or(l.entry.ChainID, l.entry.Name), l.entry.ID)
}

// DamagedError is the answer about a committed snapshot that is not whole and
// could not be healed. It is FailedPrecondition to containerd; docs/design.md
// has what containerd does with each kind of error.
type DamagedError struct {
	ID        uint64
	Name      string
	Namespace string // containerd's, "" when not known
	ChainID   string // "" when not known
	Findings  []seal.Finding
	Reason    string // why it was not healed
	// NoBlob: there is no good blob to heal it from. Only another pull can
	// help, and containerd makes none before it has forgotten the layer.
	NoBlob bool
}

func (l *layer) damaged() *DamagedError {
	return &DamagedError{
		ID: l.entry.ID, Name: l.entry.Name, Namespace: l.entry.Namespace, ChainID: l.entry.ChainID,
		Findings: l.state.Findings, Reason: l.state.Reason, NoBlob: l.noBlob,
	}
}

// Error implements error.
func (e *DamagedError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "layer %s (snapshots/%d) is damaged", cmp.Or(e.ChainID, e.Name), e.ID)
	if len(e.Findings) > 0 {
		fmt.Fprintf(&b, ": %q", e.Findings[0].String())
	}
	if e.Reason != "" {
		fmt.Fprintf(&b, ": not healed: %s", e.Reason)
	}
	return b.String()
}

// Unwrap returns the kind of the error.
func (e *DamagedError) Unwrap() error { return errdefs.ErrFailedPrecondition }

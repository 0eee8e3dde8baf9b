package layers

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/idle"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Labels on Stat's answer about a committed snapshot. They are not stored.
const (
	labelState    = layout.OwnLabels + "state"    // one of the State constants
	labelSealed   = layout.OwnLabels + "sealed"   // time of the commit, RFC 3339
	labelStrategy = layout.OwnLabels + "strategy" // how it was made durable
)

// checkRoot finds a layer whose directory was removed or replaced.
func (t *table) checkRoot(ctx context.Context, l *layer) {
	t.mu.Lock()
	known, e, order := l.state.State == storage.StateDamaged || l.work != nil, l.entry, t.begin()
	t.mu.Unlock()
	if known {
		return
	}
	f, damaged := verify.Root(t.root.Tree(e.ID))
	if !damaged {
		return
	}
	c := verify.New(e)
	c.Depth, c.Order = storage.DepthRoot, order
	c.Damaged(f)
	t.mu.Lock()
	t.note(ctx, l, c)
	t.mu.Unlock()
}

// Ready returns nil when a committed snapshot and all below it are known to be whole. It
// verifies nothing: it is for Commit, during which containerd holds its lock.
func (t *table) Ready(name string) error {
	chain, err := t.chain(name)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, l := range chain {
		if err := t.verdict(l); err != nil {
			return err
		}
	}
	return nil
}

// Has reports whether the layer of an extraction is here already under its name:
// committed, ready, with everything below it, and the same layer on the same parent.
func (t *table) Has(ctx context.Context, c snapshots.Info) bool {
	chain, err := t.chain(c.Name)
	if err != nil {
		return false // there is no such name, or a parent of it is missing
	}
	l := chain[len(chain)-1]
	t.checkRoot(ctx, l)
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, below := range chain {
		if t.verdict(below) != nil {
			return false
		}
	}
	chainID, diffID := layout.ChainIDOf(c.Name, c.Labels), c.Labels[layout.LabelDiffID]
	return l.state.State == storage.StateReady && l.entry.Parent == c.Parent && chainID != "" && l.entry.ChainID == chainID &&
		(diffID == "" || l.entry.DiffID == "" || diffID == l.entry.DiffID)
}

// needsNoWork reports whether the verdict on a layer is final without work.
func (t *table) needsNoWork(l *layer) bool {
	switch {
	case l.broken != nil:
		return true
	case l.named:
		return false
	case l.state.State == storage.StateReady:
		return true
	case l.state.State == storage.StateDamaged:
		return !l.heals.Due()
	}
	return l.entry.Digest == ""
}

// verdict is nil for a layer of which nothing bad is known. One that was never sealed
// was committed by another snapshotter, and cannot be verified.
func (t *table) verdict(l *layer) error {
	switch {
	case l.state.State == storage.StateReady, l.state.State == storage.StateUnverified && l.entry.Digest == "":
		return nil
	case l.state.State == storage.StateDamaged:
		return l.damaged()
	case l.broken != nil:
		return fmt.Errorf("%s: %w: %w", l.describe(), l.broken, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("%s could not be verified: %s: %w", l.describe(), l.state.Reason, errdefs.ErrUnavailable)
}

// report notes that a caller gets an error for a layer, and returns it. The journal must
// have that soon: containerd is notified when the layer is ready, by this daemon or the
// next.
func (t *table) report(l *layer, err error) error {
	if err == nil {
		return nil
	}
	l.announced = false
	if !l.state.Reported {
		t.put(l, func(s *storage.StateEntry) { s.Reported = true })
		select {
		case t.flushSoon <- struct{}{}:
		default:
		}
	}
	return err
}

// set changes the state of a layer, in memory, and forgets that its directory was there. table.mu
// must be held.
func (t *table) set(l *layer, change func(*storage.StateEntry)) {
	l.there = time.Time{}
	change(&l.state)
}

// put is set, and has the state written to the journal with the next flush.
func (t *table) put(l *layer, change func(*storage.StateEntry)) {
	t.set(l, change)
	if t.layers[l.entry.Name] == l { // not of one that was removed
		t.pending[l.entry.ID] = l.state
	}
}

// begin numbers a verification at its beginning. The wall clock cannot order
// them: a board without a real-time clock starts in 1970.
func (t *table) begin() uint64 {
	t.order++
	return t.order
}

// note takes the result of a verification as what is known of a layer, as far as
// it is evidence about the tree that is there, and reports whether it was.
//
// Damage counts unless the tree was exchanged since. A result without damage does
// not overrule damage that was found at a greater depth, or by a verification
// that began later. A result that is no answer changes nothing but the reason.
// table.mu must be held; a flush brings the state into the journal.
func (t *table) note(ctx context.Context, l *layer, c verify.Result) (taken bool) {
	if t.layers[l.entry.Name] != l || !c.Ref.Same(l.entry.Ref()) {
		return false // removed, or exchanged
	}
	was, next := l.state, l.state
	damaged := was.State == storage.StateDamaged || was.State == storage.StateHealing
	switch {
	case c.State == storage.StateDamaged && damaged:
		// What was found deeper is still so, whatever a shallower one finds now.
		if !c.Depth.Covers(was.Depth) {
			c.Findings, c.Depth = finding.Merge(was.Findings, c.Findings, verify.MaxFindings), was.Depth
		}
		next.Findings, next.Depth = c.Findings, c.Depth
	case c.State == storage.StateDamaged:
		next.State, next.Findings, next.Depth, next.Reason = storage.StateDamaged, c.Findings, c.Depth, c.Reason
		l.heals, l.noBlob = idle.Pause{}, false
		log.G(ctx).WithFields(log.Fields{"event": "layer_damaged", "name": l.entry.Name, "id": l.entry.ID, "depth": c.Depth, "findings": finding.Texts(c.Findings), "reason": c.Reason}).
			Error("a layer is damaged")
		t.brake.Found(l.entry.ID, c.Findings)
	case c.State != storage.StateReady && c.State != verify.NotComparable:
		if was.State == storage.StateUnverified {
			t.set(l, func(s *storage.StateEntry) { s.Reason = c.Reason })
		}
		return false
	case damaged && (was.State == storage.StateHealing || c.Order < l.order || !c.Depth.Covers(was.Depth)):
		return false
	default:
		if damaged {
			log.G(ctx).WithFields(log.Fields{"name": l.entry.Name, "id": l.entry.ID, "depth": c.Depth, "was": finding.Texts(was.Findings)}).
				Warn("a layer that was found damaged is whole now; nothing was replaced")
			t.brake.Cleared(l.entry.ID)
		}
		next.State, next.Findings, next.Depth, next.Reason = storage.StateReady, nil, "", ""
		l.noBlob = false
	}
	next.Epoch, next.Checked, next.Tree = t.epoch, time.Now().UTC(), l.entry.Digest
	if !c.Deep.IsZero() {
		next.Deep = c.Deep
	}
	l.order = max(l.order, c.Order)
	t.put(l, func(s *storage.StateEntry) { *s = next })
	t.announce(l)
	return true
}

// readyState is the state of a layer that was just extracted again.
// table.mu must be held.
func (t *table) readyState(l *layer) storage.StateEntry {
	return storage.StateEntry{
		ID: l.entry.ID, State: storage.StateReady, Epoch: t.epoch, Checked: time.Now().UTC(),
		Tree: l.entry.Digest, Reported: l.state.Reported,
	}
}

// announce reports a layer that is ready after a caller was refused it. The debt
// stays on record until Announced. table.mu must be held.
func (t *table) announce(l *layer) {
	if l.state.State != storage.StateReady || !l.state.Reported || l.announced {
		return
	}
	l.announced = true
	if t.onReady != nil {
		t.onReady(l.entry)
	}
}

// announceAll reports the layers that an earlier daemon refused, and of which
// containerd was not notified before it ended.
func (t *table) announceAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, l := range t.layers {
		t.announce(l)
	}
}

// Announced is called when containerd has been notified that a layer, which was
// reported by [Config.OnReady], is ready. Until then every start reports it again.
func (t *table) Announced(namespace, chainID string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, l := range t.layers {
		if l.entry.Namespace == namespace && l.entry.ChainID == chainID && l.state.State == storage.StateReady && l.announced {
			l.announced = false
			t.put(l, func(s *storage.StateEntry) { s.Reported = false })
		}
	}
}

// Labels adds to a row, and to its map of labels, what is known of the layer.
func (t *table) Labels(info snapshots.Info) snapshots.Info {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.layers[info.Name]
	if l == nil {
		return info
	}
	if info.Labels == nil {
		info.Labels = map[string]string{}
	}
	info.Labels[labelState] = string(l.state.State)
	info.Labels[labelSealed] = l.entry.Time.Format(time.RFC3339Nano)
	info.Labels[labelStrategy] = string(l.entry.Strategy)
	return info
}

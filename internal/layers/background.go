package layers

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/idle"
	"github.com/durable-snapshotter/durable-snapshotter/internal/marks"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

const retryEvery = time.Minute // between two attempts to heal what could not be healed

// verifyAll verifies what is unverified after an unclean shutdown, in the order in
// which containerd will need it, and then heals what is damaged: how much is damaged
// must be known before anything is replaced in the background. A caller that waits for
// a layer meanwhile does not wait for its turn, and while one waits there is no rest. Afterwards it retries now and then what
// could not be healed, until ctx ends.
func (s *Layers) verifyAll(ctx context.Context) {
	s.table.announceAll()
	names, err := s.verifyOrder(ctx)
	if err != nil {
		log.G(ctx).WithError(err).Warn("layers are verified when a caller needs them, not before")
	}
	if len(names) > 0 {
		log.G(ctx).WithField("layers", len(names)).Info("verifying layers")
	}
	p := idle.NewProgress("verifying layers", len(names))
	for _, name := range names {
		began := time.Now()
		p.Step(ctx, s.ensureChain(ctx, name, false) == nil)
		if s.waiting.Load() == 0 && !idle.RestAfter(ctx, began) || ctx.Err() != nil {
			return
		}
	}
	if len(names) > 0 {
		p.Log(ctx, "all layers were verified")
	}
	if !s.checkRoots(ctx, idle.RestAfter) {
		return
	}
	for compared := false; ; compared = true {
		for _, name := range s.table.in(storage.StateUnverified, storage.StateDamaged) {
			_ = s.ensureChain(ctx, name, true) // logs itself what it finds
		}
		if !compared {
			s.compareAboveHealed(ctx)
		}
		if !idle.Rest(ctx, retryEvery) {
			return
		}
	}
}

// checkRoots finds, of the layers that are ready, those that have no tree any more. It
// reports false when ctx has ended.
func (s *Layers) checkRoots(ctx context.Context, rest func(context.Context, time.Time) bool) bool {
	for names := range slices.Chunk(s.table.in(storage.StateReady), 100) {
		began := time.Now()
		for _, name := range names {
			if l := s.table.get(name); l != nil {
				s.table.checkRoot(ctx, l)
			}
		}
		if !rest(ctx, began) {
			return false
		}
	}
	return true
}

// ensureChain verifies a committed snapshot and all below it, also above one that is
// damaged: that one may be healed later, and then the others are known. With heal it
// heals them, too.
func (s *Layers) ensureChain(ctx context.Context, name string, heal bool) error {
	chain, err := s.table.chain(name)
	for _, l := range chain {
		err = errors.Join(err, s.ensureLayer(ctx, l, heal, time.Now()))
	}
	return err
}

// verifyOrder returns the committed snapshots that are not ready: first those on
// which containers are, by how many, then the newest. Most containers are on
// that of the pause image, of which every pod has one.
func (s *Layers) verifyOrder(ctx context.Context) ([]string, error) {
	users, names := map[string]int{}, s.table.in(storage.StateUnverified, storage.StateDamaged)
	if len(names) == 0 {
		return nil, nil
	}
	err := s.gate.View(ctx, func(_ context.Context, j *storage.Journal) error {
		return j.EachRow(func(row storage.BareRow) error {
			if row.Kind != snapshots.KindCommitted {
				users[row.Parent]++
			}
			return nil
		})
	})
	slices.SortStableFunc(names, func(a, b string) int { return cmp.Compare(users[b], users[a]) })
	return names, err
}

// compareInherited verifies what a layer has inherited, and heals it if that is not
// what the layers below show. Such damage has the depth of content, so that no
// comparison with the layer's own seal disproves it.
func (s *Layers) compareInherited(ctx context.Context, l *layer) {
	t := s.table
	t.mu.Lock()
	e, state := l.entry, l.state.State
	c := verify.New(e)
	c.Order = t.begin()
	t.mu.Unlock()
	if state != storage.StateReady && state != storage.StateUnverified {
		return // it is going to be extracted again
	}
	found, err := s.inherited.findings(ctx, l, e)
	if ctx.Err() != nil || err == nil && len(found) == 0 {
		return
	}
	if err != nil {
		s.inherited.notCompared(ctx, e, err)
		return
	}
	c.Depth = storage.DepthContent
	c.Damaged(found...)
	t.mu.Lock()
	s.table.note(ctx, l, c)
	t.mu.Unlock()
	_ = s.ensureLayer(ctx, l, true, time.Now()) // logs itself what it finds
}

// compareAbove verifies what layers have inherited that stand on one that was just
// healed.
func (s *Layers) compareAbove(ctx context.Context, healed string) {
	s.compareLayers(ctx, func(l *layer) bool { return l.entry.Name == healed })
}

// compareAboveHealed does it for all layers that were ever healed: an earlier daemon
// may have ended before it did, or did not know of it.
func (s *Layers) compareAboveHealed(ctx context.Context) {
	s.compareLayers(ctx, func(l *layer) bool { return l.entry.Strategy == storage.StrategyHealed })
}

func (s *Layers) compareLayers(ctx context.Context, on func(*layer) bool) {
	for _, l := range s.table.above(on) {
		began := time.Now()
		if err := idle.Contain(func() error { s.compareInherited(ctx, l); return nil }); err != nil {
			_, e := s.table.current(l)
			log.G(ctx).WithField("name", e.Name).WithError(err).Error("what a layer has inherited cannot be compared")
		}
		if !idle.RestAfter(ctx, began) {
			return
		}
	}
}

// suspect has a layer verified, and healed if it is damaged, because of an error that
// reading its seal met. It does not wait for that: containerd may hold its lock.
// Until then the layer is unverified.
func (s *Layers) suspect(ctx context.Context, e storage.CommitEntry, why error) error {
	t := s.table
	if l := t.layer(e); l != nil {
		t.mu.Lock()
		if l.state.State == storage.StateReady {
			log.G(ctx).WithFields(log.Fields{"name": e.Name, "id": e.ID}).WithError(why).Warn("a layer is verified, because its seal could not be used")
			t.set(l, func(s *storage.StateEntry) { s.State, s.Reason = storage.StateUnverified, firstLine(why.Error()) })
		}
		if s.background.Err() == nil {
			s.running.Go(func() { _ = s.ensureLayer(s.background, l, true, time.Now()) }) // logs itself what it finds
		}
		t.mu.Unlock()
	}
	return &marks.BelowError{Err: fmt.Errorf("layer snapshots/%d is being verified; extract what is above it again when that is done: %w", e.ID, why)}
}

package layers

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/idle"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/metrics"
	"github.com/durable-snapshotter/durable-snapshotter/internal/recorded"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// After an attempt to heal has failed, the answer holds for healAgain. When the
// attempt has cost something, an extraction or a full disk, the pause doubles
// each time, up to healRarely.
const (
	healAgain  = 10 * time.Second
	healRarely = 30 * time.Minute
)

// process verifies a layer that is unverified, and heals it, if it is damaged and heal
// is set. It ends with the snapshotter, not with the caller. A panic, of a library that
// reads what an image brings, ends the work on this layer only.
func (s *Layers) process(l *layer, heal bool) {
	t := s.table
	err := idle.Contain(func() error {
		s.verifyAndHeal(s.background, l, heal)
		return nil
	})
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		log.G(s.background).WithFields(log.Fields{"event": "layer_failed", "name": l.entry.Name}).WithError(err).Error("a layer cannot be processed: nothing more is tried until the daemon is started again")
		l.broken = err
		t.set(l, func(s *storage.StateEntry) {
			switch {
			case s.State != storage.StateHealing:
			case l.entry.Digest == "":
				s.State = storage.StateUnverified
			default:
				s.State = storage.StateDamaged
			}
			s.Reason = firstLine(err.Error())
		})
	}
	w := l.work
	l.work = nil
	close(w.done)
}

func (s *Layers) verifyAndHeal(ctx context.Context, l *layer, heal bool) {
	t := s.table
	t.mu.Lock()
	named := heal && l.named
	l.named = l.named && !named
	t.mu.Unlock()
	state, entry := t.current(l)
	if state == storage.StateUnverified && entry.Digest != "" && !named {
		if !acquire(ctx, s.verifying) {
			return
		}
		result, err := s.verify(ctx, l, verify.Options{})
		<-s.verifying
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			log.G(ctx).WithError(err).Warn("a layer could not be verified")
			result = verify.Result{State: storage.StateUnverified, Reason: err.Error(), Ref: entry.Ref()}
		}
		t.mu.Lock()
		s.table.note(ctx, l, result)
		t.mu.Unlock()
		state, _ = t.current(l)
	}
	if !heal || state != storage.StateDamaged && !named {
		return
	}
	_ = s.recorder.flush(ctx) // tried again later
	// The extraction takes attributes from the parents. Not all of them were
	// verified for a caller that needs only this layer.
	if entry.Parent != "" {
		if err := s.ensureReady(ctx, entry.Parent, false); err != nil {
			s.notHealed(ctx, l, fmt.Errorf("%w: %w", errParent, err))
			return
		}
	}
	if !acquire(ctx, s.healing) {
		return
	}
	defer func() { <-s.healing }()
	if !named {
		damaged, err := s.confirm(ctx, l)
		if err != nil {
			s.notHealed(ctx, l, fmt.Errorf("%w: %w", errUnconfirmed, err))
			return
		}
		if !damaged {
			return
		}
	}
	t.mu.Lock()
	why, stopped := s.table.brake.Stopped(ctx)
	t.mu.Unlock()
	if stopped {
		s.notHealed(ctx, l, fmt.Errorf("%w: %s; run durable-snapshotter repair --apply", errStopped, why))
		return
	}
	if named {
		s.heal(ctx, l, named)
		return
	}
	t.mu.Lock()
	attempts := l.state.Attempts
	if attempts < maxAttempts {
		t.put(l, func(s *storage.StateEntry) { s.Attempts++ })
	}
	t.mu.Unlock()
	if attempts >= maxAttempts {
		s.notHealed(ctx, l, fmt.Errorf("the daemon ended %d times while it healed this layer; run durable-snapshotter repair --apply to try again", attempts))
		return
	}
	if err := s.recorder.flush(ctx); err != nil {
		s.notHealed(ctx, l, err)
		return
	}
	s.heal(ctx, l, named)
	t.mu.Lock()
	t.put(l, func(s *storage.StateEntry) { s.Attempts = 0 }) // it came to an end, whichever
	t.mu.Unlock()
}

// maxAttempts bounds the healings of a layer that end with the daemon: killed for
// its memory, or by a panic in a goroutine of a library.
const maxAttempts = 5

// errUnconfirmed: nothing is replaced, or dropped, on one finding.
var errUnconfirmed = errors.New("it could not be verified again before it is replaced")

// errStopped: too much is damaged at once.
var errStopped = errors.New("mending is stopped")

// errParent: a layer is not extracted again while one below it is not whole.
var errParent = errors.New("a layer below it is not ready")

// verify is verify.Layer for a layer of this root; a deep one also compares what the
// layer has inherited. It notes nothing.
func (s *Layers) verify(ctx context.Context, l *layer, o verify.Options) (verify.Result, error) {
	t := s.table
	t.mu.Lock()
	entry, order := l.entry, t.begin()
	o.Contents, o.Blobs = l.state.Contents, s.blobs
	t.mu.Unlock()
	c, err := verify.Layer(ctx, s.root.Path, entry, o)
	c.Order = order
	if err == nil && o.Deep && c.State == storage.StateReady {
		err = s.inherited.add(ctx, l, entry, &c)
	}
	return c, err
}

// confirm verifies a damaged layer once more, as deep as the damage was found,
// right before it is replaced or its image dropped: what was wrong may have been a
// cable, a mount, or a backup that is over. It reports whether the layer is damaged
// still; an error means that this cannot be known now.
func (s *Layers) confirm(ctx context.Context, l *layer) (damaged bool, err error) {
	t := s.table
	t.mu.Lock()
	entry, depth := l.entry, l.state.Depth
	t.mu.Unlock()
	if entry.Digest == "" {
		// Never sealed: all that can be found is that its root is gone.
		if _, gone := verify.Root(s.root.Tree(entry.ID)); gone {
			return true, nil
		}
		t.mu.Lock()
		t.put(l, func(s *storage.StateEntry) {
			*s = recorded.Judge(t.epoch, entry, storage.StateEntry{Reported: s.Reported})
		})
		t.mu.Unlock()
		return false, nil
	}
	c, err := s.verify(ctx, l, verify.Options{Deep: depth.Covers(storage.DepthContent), Reading: verify.FromDisk})
	if err != nil {
		return false, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if !s.table.note(ctx, l, c) && c.State == storage.StateDamaged {
		return false, errRemoved
	}
	if c.State == verify.NotComparable && l.state.State == storage.StateDamaged {
		return false, errors.New(c.Reason)
	}
	s.table.brake.Settle()
	return l.state.State == storage.StateDamaged, nil
}

func acquire(ctx context.Context, c chan struct{}) bool {
	select {
	case c <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

// heal extracts a damaged layer again, out of a blob of it, and puts the new tree in the place of the damaged one. Its parents are
// whole.
func (s *Layers) heal(ctx context.Context, l *layer, named bool) {
	t := s.table
	t.mu.Lock()
	if l.state.State != storage.StateDamaged && !named {
		t.mu.Unlock()
		return
	}
	was := l.state.State
	t.set(l, func(s *storage.StateEntry) { s.State = storage.StateHealing })
	entry := l.entry
	t.mu.Unlock()

	start := time.Now()
	healed, used, err := s.healer.extractAgain(ctx, entry)
	if err != nil {
		t.mu.Lock()
		t.set(l, func(s *storage.StateEntry) { s.State = was })
		t.mu.Unlock()
		s.notHealed(ctx, l, err)
		return
	}
	t.mu.Lock()
	l.entry = healed
	t.set(l, func(s *storage.StateEntry) { *s = t.readyState(l) })
	l.heals, l.noBlob = idle.Pause{}, false
	t.mu.Unlock()
	// If the new tree differs from its seal at once, healing is no cure, and the
	// next layer must not be replaced.
	c, err := s.verify(ctx, l, verify.Options{})
	if err == nil && c.State == storage.StateReady {
		err = s.inherited.add(ctx, l, healed, &c)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err == nil {
		s.table.note(ctx, l, c)
	}
	if l.state.State == storage.StateDamaged {
		l.heals.Failed(healAgain, healRarely) // also when an operator lets mending go on
		s.table.brake.Stop(ctx, fmt.Sprintf("%s was extracted again and is damaged at once", l.describe()), true)
		return
	}
	metrics.Heals.WithLabelValues(metrics.OK).Inc()
	metrics.Since(metrics.HealSeconds, start)
	s.table.announce(l)
	s.table.brake.Settle()
	if used.Place != "" && s.cfg.OnOutside != nil {
		s.cfg.OnOutside(l.entry, used)
	}
	s.running.Go(func() { s.compareAbove(s.background, entry.Name) })
	log.G(ctx).WithFields(log.Fields{"event": "layer_healed", "name": entry.Name, "id": entry.ID, "from": used.String(), "took": time.Since(start).String()}).
		Warn("a damaged layer was extracted again from its blob")
}

// notHealed notes why a layer is damaged still.
func (s *Layers) notHealed(ctx context.Context, l *layer, err error) {
	t := s.table
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.layers[l.entry.Name] != l {
		return // removed meanwhile
	}
	if l.state.Reason != err.Error() && !errors.Is(err, errRemoved) && ctx.Err() == nil {
		log.G(ctx).WithFields(log.Fields{"event": "layer_not_healed", "name": l.entry.Name, "id": l.entry.ID}).WithError(err).Error("a damaged layer was not healed")
	}
	t.put(l, func(s *storage.StateEntry) { s.Reason = err.Error() })
	l.noBlob = errors.Is(err, errNoBlob)
	switch {
	case l.noBlob:
		metrics.Heals.WithLabelValues(metrics.NoBlob).Inc()
	case errors.Is(err, errStopped):
		metrics.Heals.WithLabelValues(metrics.Stopped).Inc()
	case !errors.Is(err, errParent) && ctx.Err() == nil:
		metrics.Heals.WithLabelValues(metrics.Failed).Inc()
	}
	switch {
	case errors.Is(err, errParent):
		l.heals = idle.Pause{} // nothing was tried: again, as soon as that one is
	case l.noBlob, errors.Is(err, errUnconfirmed):
		l.heals.Begin(healAgain) // cheap, and a blob may come back
	default:
		l.heals.Failed(healAgain, healRarely)
	}
	if why, _ := s.table.brake.Stopped(ctx); why != "" && l.noBlob {
		log.G(ctx).WithField("reason", why).Warn("mending is stopped: the images of a damaged layer without a good blob are not dropped")
		return
	}
	if s.cfg.OnDamaged != nil && ctx.Err() == nil && l.state.State == storage.StateDamaged {
		s.cfg.OnDamaged(l.damaged())
	}
}

// ConfirmDamaged returns nil when the images of a layer may be dropped: it is
// damaged, was verified once more just now, has no good blob that it could be
// healed from, and mending is not stopped. Every other case is an error that
// explains why nothing may be dropped.
func (s *Layers) ConfirmDamaged(ctx context.Context, namespace, chainID string) error {
	t := s.table
	// How much is damaged must be known before anything is dropped: a start has not examined all.
	s.examined.Do(func() { s.checkRoots(ctx, func(context.Context, time.Time) bool { return true }) })
	t.mu.Lock()
	found := t.named(namespace, chainID)
	why, _ := s.table.brake.Stopped(ctx)
	var err error
	switch l := found; {
	case l == nil:
		err = fmt.Errorf("layer %s in namespace %q is not known: %w", chainID, namespace, errdefs.ErrNotFound)
	case why != "":
		err = fmt.Errorf("mending is stopped: %s: %w", why, errdefs.ErrUnavailable)
	case l.work != nil:
		err = fmt.Errorf("%s is being verified or healed: %w", l.describe(), errdefs.ErrUnavailable)
	case l.state.State != storage.StateDamaged || !l.noBlob:
		err = fmt.Errorf("%s is %s and may be healed: %w", l.describe(), l.state.State, errdefs.ErrUnavailable)
	}
	t.mu.Unlock()
	if err != nil {
		return err
	}
	damaged, err := s.confirm(ctx, found)
	if err != nil {
		return fmt.Errorf("verify %s again: %w: %w", found.describe(), err, errdefs.ErrUnavailable)
	}
	if !damaged {
		return fmt.Errorf("%s is whole: %w", found.describe(), errdefs.ErrUnavailable)
	}
	return nil
}

// HealNow heals a damaged layer at once, because there is a good blob of it now, and returns
// nil when it is ready.
func (s *Layers) HealNow(ctx context.Context, namespace, chainID string) error {
	s.table.mu.Lock()
	l := s.table.named(namespace, chainID)
	if l == nil {
		s.table.mu.Unlock()
		return fmt.Errorf("layer %s in namespace %q is not known: %w", chainID, namespace, errdefs.ErrNotFound)
	}
	l.heals = idle.Pause{}
	name := l.entry.Name
	s.table.mu.Unlock()
	return s.ensureReady(ctx, name, true)
}

// named returns the layer that containerd's images refer to by a chain ID, nil when there is
// none. Another client may have the same layer under a name of its own. It is called with mu
// held.
func (t *table) named(namespace, chainID string) (found *layer) {
	for _, l := range t.layers {
		if _, name := layout.SplitName(l.entry.Name); l.entry.Namespace == namespace && name == chainID {
			found = l
		}
	}
	return found
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

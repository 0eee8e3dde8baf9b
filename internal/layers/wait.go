package layers

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// DefaultWait is how long a Stat or a Mounts without a deadline waits for verification
// or healing. containerd calls them without holding a lock. Its CRI plugin calls Stat when it starts,
// for all images at once, and serves no request before it has the answers (CheckImages).
const DefaultWait = 2 * time.Minute

// Wait is ensureReady, for DefaultWait when ctx has no deadline.
func (s *Layers) Wait(ctx context.Context, name string, topOnly bool) error {
	if s.table.whole(name, topOnly, 0) {
		return nil
	}
	if _, bounded := ctx.Deadline(); !bounded {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, DefaultWait)
		defer stop()
	}
	return s.ensureReady(ctx, name, topOnly)
}

// ensureReady returns nil when a committed snapshot and all below it are whole (I2).
// What is unverified is verified first, what is damaged is healed, the base first, as
// long as ctx lasts; the work goes on when ctx has ended.
//
// Of layers that are known to be ready nothing is read but an lstat: of each, or
// with topOnly of the snapshot itself.
func (s *Layers) ensureReady(ctx context.Context, name string, topOnly bool) error {
	if s.table.whole(name, topOnly, 0) {
		return nil
	}
	chain, err := s.table.chain(name)
	if err != nil {
		return err
	}
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	asked := time.Now()
	s.begin(chain)
	for i, l := range chain {
		if !topOnly || i == len(chain)-1 {
			s.table.checkRoot(ctx, l)
		}
		if err := s.ensureLayer(ctx, l, true, asked); err != nil {
			return err
		}
	}
	return nil
}

// begin has the layers of a chain that are unverified verified side by side.
func (s *Layers) begin(chain []*layer) {
	t := s.table
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, l := range chain {
		if l.work == nil && l.state.State == storage.StateUnverified && !t.needsNoWork(l) && s.background.Err() == nil {
			s.start(l, false)
		}
	}
}

func (s *Layers) start(l *layer, heal bool) {
	l.work = &work{done: make(chan struct{}), begun: time.Now()}
	s.running.Go(func() { s.process(l, heal) })
}

// remembered is how long a directory counts as there, for Mounts, after an lstat has found it.
const remembered = time.Second

// Lately reports whether a committed snapshot and all below it are ready, with an lstat of its own
// directory, and of one below it when the last is older than a second.
func (t *table) Lately(name string) bool { return t.whole(name, false, remembered) }

// whole is ensureReady where nothing is to be done, nearly always: one walk up the chain.
func (t *table) whole(name string, topOnly bool, within time.Duration) bool {
	now := time.Now()
	var chain []*layer
	var ids []uint64
	t.mu.Lock()
	for at := name; at != ""; {
		l := t.layers[at]
		if l == nil || l.work != nil || !t.needsNoWork(l) || t.verdict(l) != nil {
			t.mu.Unlock()
			return false
		}
		if at == name || !topOnly && (within == 0 || now.Sub(l.there) >= within) {
			chain, ids = append(chain, l), append(ids, l.entry.ID)
		}
		at = l.entry.Parent
	}
	t.mu.Unlock()
	if !verify.Roots(t.root, ids) {
		return false
	}
	t.mu.Lock()
	for _, l := range chain {
		l.there = now
	}
	t.mu.Unlock()
	return true
}

// errStopping is the answer to callers that wait when the daemon is stopped.
var errStopping = fmt.Errorf("the daemon is stopping: %w", errdefs.ErrUnavailable)

// ensureLayer is ensureReady for one layer, whatever its parents are. It is not healed while one of
// them is not whole, and without heal not at all. A verification that began before the caller asked,
// and could not be done, is repeated: what hindered it may be gone.
func (s *Layers) ensureLayer(ctx context.Context, l *layer, heal bool, asked time.Time) error {
	t := s.table
	t.mu.Lock()
	defer t.mu.Unlock()
	for begun := 0; ; {
		if l.work == nil {
			// Twice at most, because the first work may verify without healing.
			if begun == 2 || t.needsNoWork(l) || !heal && l.state.State == storage.StateDamaged {
				break
			}
			if s.background.Err() != nil {
				return fmt.Errorf("%s: %w", l.describe(), errStopping)
			}
			begun++
			s.start(l, heal)
		}
		w := l.work
		t.mu.Unlock()
		select {
		case <-w.done:
		case <-ctx.Done():
		case <-s.background.Done():
		}
		t.mu.Lock()
		if l.work == w {
			if ctx.Err() == nil {
				return t.report(l, fmt.Errorf("%s: %w", l.describe(), errStopping))
			}
			return t.report(l, fmt.Errorf("%s is being verified or healed; try again: %w: %w", l.describe(), ctx.Err(), errdefs.ErrUnavailable))
		}
		// Another caller may have begun the next work before this one woke up.
		late := l.state.State == storage.StateUnverified && w.begun.Before(asked)
		if l.work == nil && l.state.State != storage.StateDamaged && !l.named && !late {
			break
		}
	}
	err := t.verdict(l)
	if err != nil && s.background.Err() != nil {
		err = fmt.Errorf("%s: %w", l.describe(), errStopping) // its verification, or its heal, was cut short
	}
	return t.report(l, err)
}

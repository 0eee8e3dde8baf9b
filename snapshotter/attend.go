package snapshotter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

const (
	progressEvery = 10 * time.Second // between two words on the progress of background work
	retryEvery    = time.Minute      // between two attempts to heal what could not be healed
	// restAtMost is the longest pause after a look in the background. It is as
	// long as the look was, so that half of the disk's time is left to others.
	restAtMost = time.Second
)

// attend looks at a layer, if nobody has, and heals it, if it is damaged. It
// ends with the snapshotter, not with whoever asked.
func (s *Snapshotter) attend(l *layer) {
	ctx := s.background
	r := &s.ready
	defer func() {
		r.mu.Lock()
		w := l.work
		l.work = nil
		r.mu.Unlock()
		close(w.done)
	}()
	r.mu.Lock()
	state, entry := l.state, l.entry
	r.mu.Unlock()
	if state.State == storage.StateUnverified && entry.Digest != "" {
		if !take(ctx, r.looks) {
			return
		}
		result, err := Check(ctx, s.cfg.Root, entry, CheckOptions{})
		<-r.looks
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			log.G(ctx).WithError(err).Warn("a layer could not be looked at")
			result = CheckResult{State: storage.StateUnverified, Reason: err.Error()}
		}
		r.mu.Lock()
		s.setState(ctx, l, result)
		state = l.state
		r.mu.Unlock()
	}
	if state.State != storage.StateDamaged {
		return
	}
	s.saySoon(ctx)
	// The extraction takes attributes from the parents. Not all of them were
	// looked at for whoever asked only for this layer.
	if entry.Parent != "" {
		if err := s.whole(ctx, entry.Parent, false); err != nil {
			s.notHealed(ctx, l, fmt.Errorf("a layer below it is not ready: %w", err))
			r.mu.Lock()
			l.tried = time.Time{} // nothing was tried: again, as soon as that one is
			r.mu.Unlock()
			return
		}
	}
	if !take(ctx, r.heals) {
		return
	}
	defer func() { <-r.heals }()
	s.heal(ctx, l)
}

func take(ctx context.Context, c chan struct{}) bool {
	select {
	case c <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

// attendAll looks at what is unverified after an unclean boot, in the order in
// which it is going to be asked for, and heals what is damaged. Whoever asks for
// a layer meanwhile does not wait for its turn. Afterwards it tries now and then
// to heal what could not be healed, until ctx ends.
func (s *Snapshotter) attendAll(ctx context.Context) {
	names, err := s.unattended(ctx)
	if err != nil {
		log.G(ctx).WithError(err).Warn("layers are looked at when they are asked for, not before")
	}
	if len(names) > 0 {
		log.G(ctx).WithField("layers", len(names)).Info("looking at layers")
	}
	p := newProgress("looking at layers", len(names))
	for _, name := range names {
		began := time.Now()
		p.step(ctx, s.eachOf(ctx, name) == nil)
		if !rest(ctx, min(time.Since(began), restAtMost)) {
			return
		}
	}
	if len(names) > 0 {
		p.log(ctx, "looked at all layers")
	}
	for rest(ctx, retryEvery) {
		for _, name := range s.ready.in(storage.StateUnverified, storage.StateDamaged) {
			_ = s.eachOf(ctx, name) // says itself what it finds
		}
	}
}

// progress says in the log how far work on many layers is.
type progress struct {
	what               string
	started, said      time.Time
	done, of, notReady int
	bytes              int64 // of content
}

func newProgress(what string, of int) *progress {
	return &progress{what: what, started: time.Now(), said: time.Now(), of: of}
}

// step counts a layer.
func (p *progress) step(ctx context.Context, ready bool) {
	p.done++
	if !ready {
		p.notReady++
	}
	p.say(ctx)
}

// read counts content; large layers take long.
func (p *progress) read(ctx context.Context, bytes int64) {
	p.bytes += bytes
	p.say(ctx)
}

func (p *progress) say(ctx context.Context) {
	if time.Since(p.said) >= progressEvery {
		p.said = time.Now()
		p.log(ctx, p.what)
	}
}

func (p *progress) log(ctx context.Context, what string) {
	log.G(ctx).WithFields(log.Fields{
		"done": p.done, "of": p.of, "not_ready": p.notReady, "bytes": p.bytes, "took": time.Since(p.started).String(),
	}).Info(what)
}

// eachOf looks at a committed snapshot and at all below it, also above one that
// is damaged: it may be healed later, and then the others are known.
func (s *Snapshotter) eachOf(ctx context.Context, name string) error {
	chain, err := s.ready.chain(name)
	for _, l := range chain {
		err = errors.Join(err, s.wholeLayer(ctx, l))
	}
	return err
}

// rest waits, and is false when ctx has ended.
func rest(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// unattended returns the committed snapshots that are not ready: first those on
// which containers are, by how many, then the newest. Most containers are on
// that of the pause image, of which every pod has one.
func (s *Snapshotter) unattended(ctx context.Context) ([]string, error) {
	users := map[string]int{}
	err := s.db.View(ctx, func(ctx context.Context, _ *storage.Journal) error {
		return storage.Walk(ctx, func(_ uint64, info snapshots.Info, _ snapshots.Usage) error {
			if info.Kind != snapshots.KindCommitted {
				users[info.Parent]++
			}
			return nil
		})
	})
	names := s.ready.in(storage.StateUnverified, storage.StateDamaged)
	slices.SortStableFunc(names, func(a, b string) int { return cmp.Compare(users[b], users[a]) })
	return names, err
}

// in returns the committed snapshots that are in one of the states and can be
// looked at, newest first.
func (r *readiness) in(states ...string) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []storage.CommitEntry
	for _, l := range r.layers {
		if slices.Contains(states, l.state.State) && (l.entry.Digest != "" || l.state.State == storage.StateDamaged) {
			found = append(found, l.entry)
		}
	}
	slices.SortFunc(found, func(a, b storage.CommitEntry) int { return cmp.Compare(b.Sequence, a.Sequence) })
	names := make([]string, len(found))
	for i, e := range found {
		names[i] = e.Name
	}
	return names
}

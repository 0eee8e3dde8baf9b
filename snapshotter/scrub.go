package snapshotter

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// ScrubConfig says how layers are verified again and again while nobody asks.
type ScrubConfig struct {
	Interval time.Duration // from the start of a round to that of the next; 0: never
	Deep     bool          // compare content, too
	Rate     int64         // bytes of content per second at most; 0: no limit. Of content digests, too
}

// scrubWritten is how often the journal hears how far a round is: a transaction
// for each small layer would be in the way of Commits. What a crash takes of it
// is looked at twice.
const scrubWritten = time.Second

// scrubAll verifies all layers once in each interval, until ctx ends. A round
// that was cut short by the end of the daemon goes on where it was.
func (s *Snapshotter) scrubAll(ctx context.Context) {
	depth := map[bool]string{false: "metadata", true: "content"}[s.cfg.Scrub.Deep]
	for {
		var round storage.Scrub
		if err := s.db.View(ctx, func(_ context.Context, j *storage.Journal) (err error) {
			round, err = j.Scrub()
			return err
		}); err != nil {
			log.G(ctx).WithError(err).Error("scrub: layers are not verified periodically")
			return
		}
		if round.Depth != depth {
			round = storage.Scrub{Depth: depth}
		}
		if !round.Finished.IsZero() && !rest(ctx, time.Until(round.Started.Add(s.cfg.Scrub.Interval))) {
			return
		}
		if !round.Finished.IsZero() || round.Started.IsZero() {
			round = storage.Scrub{Depth: depth, Started: time.Now().UTC()}
		}
		if err := s.scrubRound(ctx, &round); err != nil {
			if ctx.Err() == nil {
				log.G(ctx).WithError(err).Warn("scrub: round not finished; it goes on later")
			}
			if !rest(ctx, retryEvery) {
				return
			}
		}
	}
}

// scrubRound looks at the layers from round.Next on.
func (s *Snapshotter) scrubRound(ctx context.Context, round *storage.Scrub) error {
	entries := s.ready.from(round.Next)
	p := newProgress("scrub: looking at layers", len(entries))
	log.G(ctx).WithFields(log.Fields{"depth": round.Depth, "layers": len(entries), "from": round.Next}).Info("scrub: round begins")
	reading := seal.Reading{Idle: true, Rate: s.cfg.Scrub.Rate, Direct: true, Progress: func(n int64) { p.read(ctx, n) }}
	written := time.Now()
	for _, e := range entries {
		began := time.Now()
		l := s.ready.layer(e)
		if l == nil {
			continue // removed meanwhile
		}
		s.ready.mu.Lock()
		contents := l.state.Contents
		s.ready.mu.Unlock()
		look, err := Check(ctx, s.cfg.Root, e, CheckOptions{Deep: s.cfg.Scrub.Deep, Blobs: s.blobs, Contents: contents, Reading: reading})
		if err != nil {
			return err
		}
		round.Next = e.ID + 1
		if s.ready.layer(e) != nil && look.State != storage.StateUnverified {
			round.Looked++
			s.noteLook(ctx, l, e, look, false)
		}
		if look.State == storage.StateDamaged && s.ready.layer(e) != nil {
			round.Damaged++
			_ = s.whole(ctx, e.Name, true) // heals, and says itself when it cannot
		}
		p.step(ctx, look.State == storage.StateReady)
		if time.Since(written) >= scrubWritten {
			if err := s.sayScrub(ctx, *round); err != nil {
				return err
			}
			written = time.Now()
		}
		if !rest(ctx, min(time.Since(began), restAtMost)) {
			return ctx.Err()
		}
	}
	round.Finished = time.Now().UTC()
	log.G(ctx).WithFields(log.Fields{"depth": round.Depth, "looked": round.Looked, "damaged": round.Damaged, "took": round.Finished.Sub(round.Started).String()}).
		Info("scrub: round finished")
	return s.sayScrub(ctx, *round)
}

func (s *Snapshotter) sayScrub(ctx context.Context, round storage.Scrub) error {
	err := s.db.Update(context.WithoutCancel(ctx), func(_ context.Context, j *storage.Journal) error { return j.PutScrub(round) })
	if isWriteFailure(err) {
		s.onWriteFailure(ctx, err, undo{})
	}
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

// from returns the layers that have seals, with ids from first on, in their
// order.
func (r *readiness) from(first uint64) (entries []storage.CommitEntry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range r.layers {
		if l.entry.ID >= first && l.entry.Digest != "" {
			entries = append(entries, l.entry)
		}
	}
	slices.SortFunc(entries, func(a, b storage.CommitEntry) int { return int(int64(a.ID) - int64(b.ID)) })
	return entries
}

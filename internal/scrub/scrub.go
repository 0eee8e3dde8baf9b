// Package scrub verifies all layers of a root again and again in the background, in
// rounds that survive the end of the daemon.
package scrub

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/contents"
	"github.com/durable-snapshotter/durable-snapshotter/internal/gate"
	"github.com/durable-snapshotter/durable-snapshotter/internal/idle"
	"github.com/durable-snapshotter/durable-snapshotter/internal/metrics"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Layers are the committed layers of a root.
type Layers interface {
	// Sealed returns the layers that have seals, with ids from first on, in their
	// order.
	Sealed(first uint64) []storage.CommitEntry
	// Scrub verifies a layer, and heals it when it is damaged. present is false when
	// it was removed meanwhile; then the result counts for nothing. The error is
	// ErrRemoved, when it was gone before, or that of ctx.
	Scrub(ctx context.Context, e storage.CommitEntry, o verify.Options) (r verify.Result, present bool, err error)
}

// ErrRemoved: the layer was removed before it was its turn.
var ErrRemoved = errors.New("the layer was removed")

// Config controls the rounds.
type Config struct {
	Interval time.Duration // from the start of a round to that of the next; 0: never
	Depth    storage.Depth // metadata, or content, too
	Rate     int64         // bytes of content per second at most; 0: no limit. Of content digests, too
}

// written is how often the journal gets how far a round is: a transaction for each
// small layer would be in the way of Commits. Layers of which a crash has lost it are
// verified twice.
const written = time.Second

// retryEvery is the pause after a round that could not go on.
const retryEvery = time.Minute

// Run verifies all layers once in each interval, until ctx ends. A round
// that was cut short by the end of the daemon goes on where it was.
func (c Config) Run(ctx context.Context, g *gate.Gate, layers Layers) {
	for {
		var round storage.Scrub
		if err := g.View(ctx, func(_ context.Context, j *storage.Journal) (err error) {
			round, err = j.Scrub()
			return err
		}); err != nil {
			log.G(ctx).WithError(err).Error("scrub: layers are not verified periodically")
			return
		}
		if round.Depth != c.Depth {
			round = storage.Scrub{Depth: c.Depth}
		}
		if !round.Finished.IsZero() {
			metrics.ScrubCompleted.Set(float64(round.Finished.Unix()))
		}
		if !round.Finished.IsZero() && !idle.Rest(ctx, untilNext(round.Started, time.Now(), c.Interval)) {
			return
		}
		if !round.Finished.IsZero() || round.Started.IsZero() {
			round = storage.Scrub{Depth: c.Depth, Started: time.Now().UTC()}
		}
		if err := c.Round(ctx, g, layers, &round); err != nil {
			if ctx.Err() == nil {
				log.G(ctx).WithError(err).Warn("scrub: round not finished; it goes on later")
			}
			if !idle.Rest(ctx, retryEvery) {
				return
			}
		}
	}
}

// untilNext is how long the next round waits. The clock may have been set between
// started and now, by any amount: a start that lies in the future proves nothing,
// and no wait is longer than an interval. A round too many does no harm.
func untilNext(started, now time.Time, interval time.Duration) time.Duration {
	past := now.Sub(started)
	if past < 0 {
		return 0
	}
	return max(0, interval-past)
}

// Round verifies the layers from round.Next on.
func (c Config) Round(ctx context.Context, g *gate.Gate, layers Layers, round *storage.Scrub) error {
	entries := layers.Sealed(round.Next)
	p := idle.NewProgress("scrub: verifying layers", len(entries))
	log.G(ctx).WithFields(log.Fields{"depth": round.Depth, "layers": len(entries), "from": round.Next}).Info("scrub: round begins")
	reading := contents.Reading{Idle: true, Rate: c.Rate, Direct: true, Progress: func(n int64) { p.Read(ctx, n) }}
	last := time.Now()
	for _, e := range entries {
		began := time.Now()
		found, present, err := layers.Scrub(ctx, e, verify.Options{Deep: c.Depth.Covers(storage.DepthContent), Reading: reading})
		if errors.Is(err, ErrRemoved) {
			continue
		}
		if err != nil {
			return err
		}
		round.Next = e.ID + 1
		if present {
			switch found.State {
			case storage.StateUnverified:
				log.G(ctx).WithFields(log.Fields{"name": e.Name, "id": e.ID, "reason": found.Reason}).Warn("scrub: a layer could not be verified; the round goes on")
			case storage.StateDamaged:
				round.Damaged++
				fallthrough
			default:
				round.Verified++
			}
		}
		p.Step(ctx, found.State != storage.StateDamaged)
		if time.Since(last) >= written {
			if err := record(ctx, g, *round); err != nil {
				return err
			}
			last = time.Now()
		}
		if !idle.RestAfter(ctx, began) {
			return ctx.Err()
		}
	}
	round.Finished = time.Now().UTC()
	metrics.ScrubCompleted.Set(float64(round.Finished.Unix()))
	log.G(ctx).WithFields(log.Fields{"depth": round.Depth, "looked": round.Verified, "damaged": round.Damaged, "took": round.Finished.Sub(round.Started).String()}).
		Info("scrub: round finished")
	return record(ctx, g, *round)
}

func record(ctx context.Context, g *gate.Gate, round storage.Scrub) error {
	err := g.Update(ctx, nil, func(_ context.Context, j *storage.Journal) error { return j.PutScrub(round) })
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

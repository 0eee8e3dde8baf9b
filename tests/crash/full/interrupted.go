package full

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
)

// firstPatience is how long a pull may take, until it is known how long
// pulls take here, today.
const firstPatience = 200 * time.Millisecond

// Interrupts counts what became of pulls whose clients went away.
type Interrupts struct {
	Pulls     int      // begun
	Cancelled int      // ended by their clients
	InTime    int      // that were through before their client went away
	Orphaned  int      // that ended because a parent snapshot did not exist
	Failed    []string // that ended otherwise, with the reason
}

func (i Interrupts) String() string {
	return fmt.Sprintf("%d pulls, %d cancelled, %d through before that, %d without a parent, %d failed otherwise",
		i.Pulls, i.Cancelled, i.InTime, i.Orphaned, len(i.Failed))
}

// orphaned is the text of containerd's error when a layer is to be unpacked
// and the one below it is gone: the end of pulls that never succeed again.
func orphaned(err error) bool {
	text := err.Error()
	return strings.Contains(text, "parent snapshot") && strings.Contains(text, "does not exist")
}

// interrupted pulls each image several times; the client of most pulls goes
// away at a random moment, and the next one pulls the same image at once. In
// the meantime others remove images, have the garbage collected, and let the
// leases of clients that went away run out.
func (w *worker) interrupted(ctx context.Context) error {
	random := rand.New(rand.NewPCG(w.setup.Seed, 0xca9ce1))
	images := w.bench.images
	if err := w.pull(ctx, images[0].Ref); err != nil {
		return err
	}
	w.usual = firstPatience
	for round := range w.setup.Rounds {
		i := round % len(images)
		if err := w.remove(ctx, images[i].Ref); err != nil {
			return err
		}
		stop := w.race(ctx, rand.New(rand.NewPCG(w.setup.Seed, uint64(round))), i)
		err := w.insist(ctx, random, images[i].Ref)
		if raced := stop(); err == nil {
			err = raced
		}
		if err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
	}
	for _, image := range images {
		if err := w.pull(ctx, image.Ref); err != nil {
			return err
		}
	}
	return nil
}

// insist pulls an image until it is there. A client goes away up to three
// times; the last one stays.
func (w *worker) insist(ctx context.Context, random *rand.Rand, ref string) error {
	for n := 1 + random.IntN(3); n > 0; n-- {
		patience := time.Duration(random.Int64N(int64(w.usual)))
		err := w.visit(ctx, ref, patience, random.IntN(2) == 0)
		switch {
		case err == nil:
			w.interrupts.InTime++
			return nil
		case orphaned(err):
			w.interrupts.Orphaned++
		default:
			w.interrupts.Cancelled++
		}
	}
	var err error
	for range 3 {
		if err = w.visit(ctx, ref, limit, true); err == nil {
			return nil
		}
		if orphaned(err) {
			w.interrupts.Orphaned++
		} else {
			w.interrupts.Failed = append(w.interrupts.Failed, err.Error())
		}
	}
	return err
}

// visit is the visit of one client, who has a lease, pulls an image, loses
// patience or not, and may or may not delete its lease.
func (w *worker) visit(ctx context.Context, ref string, patience time.Duration, polite bool) error {
	w.interrupts.Pulls++
	ctx = namespaces.WithNamespace(ctx, namespace)
	lease, err := w.node.client.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(time.Hour))
	if err != nil {
		return err
	}
	short, cancel := context.WithTimeout(leases.WithLease(ctx, lease.ID), patience)
	defer cancel()
	began := time.Now()
	if err = w.pull(short, ref); err == nil {
		w.usual = (w.usual + time.Since(began)) / 2
	}
	if polite {
		if gone := w.node.client.LeasesService().Delete(ctx, lease, leases.SynchronousDelete); err == nil {
			err = gone
		}
	}
	return err
}

// race removes images other than number i, and collects garbage, until it is
// stopped.
func (w *worker) race(ctx context.Context, random *rand.Rand, i int) (stop func() error) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	var err error
	running.Go(func() {
		for ctx.Err() == nil && err == nil {
			// Not cancelled in the middle: its errors count.
			whole := context.WithoutCancel(ctx)
			if other := random.IntN(len(w.bench.images)); other != i && random.IntN(3) == 0 {
				err = w.remove(whole, w.bench.images[other].Ref)
			} else {
				err = w.node.prune(whole)
			}
			select {
			case <-ctx.Done():
			case <-time.After(time.Duration(random.IntN(60)) * time.Millisecond):
			}
		}
	})
	return func() error {
		cancel()
		running.Wait()
		return err
	}
}

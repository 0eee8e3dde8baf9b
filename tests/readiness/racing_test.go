package readiness

import (
	"errors"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"

	"github.com/durable-snapshotter/durable-snapshotter/images"
)

// TestDropWhilePulling: the kubelet pulls again and again while two drops run side by
// side, as of the daemon and of somebody at a terminal. Whoever comes first, in
// the end the image is there and whole: no drop takes away what was just pulled.
func TestDropWhilePulling(t *testing.T) {
	n := newNode(t)
	check(t, n.pull(t, n.pause))
	p := must[*pod](t)(n.startPod(t))
	check(t, n.pull(t, n.app))
	blobs := []digest.Digest{n.app.Layers[1].Digest, n.config(t, n.app), n.app.Manifest}
	for round := range 12 {
		check(t, n.pull(t, n.app))
		check(t, breaks["corrupt"](n.blob(blobs[round%len(blobs)])))
		n.damage(t, n.app, 1)
		var drops, pulls sync.WaitGroup
		done := make(chan struct{})
		pulls.Go(func() {
			for {
				_ = n.pull(t, n.app) // fails until the layer is dropped
				select {
				case <-done:
					return
				case <-time.After(50 * time.Millisecond): // the kubelet waits for seconds
				}
			}
		})
		for range 2 {
			o, c := n.options(t), n.repairer(t)
			drops.Go(func() {
				ctx, cancel := within(t)
				defer cancel()
				for {
					_, err := c.Drop(ctx, layer(n.app, 1), o)
					if errdefs.IsUnavailable(err) && ctx.Err() == nil {
						continue // a pull was in between: again, as the daemon does
					}
					if err != nil {
						t.Error(err)
					}
					return
				}
			})
		}
		drops.Wait()
		close(done)
		pulls.Wait()
		n.usable(t, p, n.app)
	}
}

// TestDropDiscarded: with discard_unpacked_layers containerd keeps no blobs of
// layers, so that every damaged layer must be pulled again.
func TestDropDiscarded(t *testing.T) {
	n := newNodeWith(t, nodeOptions{images: "discard_unpacked_layers = true"})
	check(t, n.pull(t, n.pause))
	check(t, n.pull(t, n.app))
	p := must[*pod](t)(n.startPod(t))
	n.collect(t)
	for _, l := range n.app.Layers {
		if _, err := os.Lstat(n.blob(l.Digest)); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("blob %s is kept: %v", l.Digest, err)
		}
	}
	lowest := n.backend(t, n.app)[0]
	n.between.say(codes.FailedPrecondition, n.backend(t, n.app)[1:]...)
	must[images.Dropped](t)(n.drop(t, n.app, 1))
	n.waitKnown(t, n.app, false)
	check(t, n.pull(t, n.app))
	check(t, p.run(t, n.app))
	if now := n.backend(t, n.app)[0]; now != lowest {
		t.Errorf("the good layer below is %s, was %s", now, lowest)
	}
}

// collect has containerd collect its garbage.
func (n *node) collect(t *testing.T) {
	t.Helper()
	must[string](t)(n.ctr(t, "leases", "create", "--id", "collect"))
	must[string](t)(n.ctr(t, "leases", "rm", "--sync", "collect"))
}

package readiness

import (
	"context"
	"errors"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestDropWhilePulling: the kubelet pulls again and again while two drops run side
// by side, as of the daemon and of an operator at a terminal. Whichever comes first, in
// the end the image is there and whole. The blob of the layer below the damaged one may
// be gone: it is collected when a drop has taken the names, and the snapshot stays if a pull
// has prepared the next one on it. No pull fetches it then, because containerd fetches from the
// first layer on that has no snapshot (core/unpack/unpacker.go:444).
func TestDropWhilePulling(t *testing.T) {
	n := newNode(t)
	p := n.inUse(t)
	for i, blob := range n.fatal(t) {
		// Documents are fetched before a pull meets the damaged layer. Pulls without
		// any pause would take a bad one each time before it is deleted.
		pause := time.Duration(0)
		if i > 0 {
			pause = 50 * time.Millisecond
		}
		for range 6 {
			check(t, n.pull(t, n.app))
			check(t, breaks["corrupt"](n.Blob(blob)))
			n.damage(t, n.app, 1)
			var drops, pulls sync.WaitGroup
			done := make(chan struct{})
			pulls.Go(func() {
				for {
					_ = n.pull(t, n.app) // fails until the layer is dropped
					select {
					case <-done:
						return
					case <-time.After(pause):
					}
				}
			})
			for range 2 {
				o, c := n.options(t), n.repairer(t)
				drops.Go(func() {
					if err := n.dropUntilDone(t, c, o); err != nil {
						t.Error(err)
					}
				})
			}
			drops.Wait()
			close(done)
			pulls.Wait()
			n.usableFrom(t, p, n.app, 1)
		}
	}
}

// TestDropBetweenPulls: the kubelet pulls right before any of the calls with which
// Drop changes something; in make test before every fourth, others for each bad blob.
func TestDropBetweenPulls(t *testing.T) {
	n := newNode(t)
	p := n.inUse(t)
	for i, blob := range n.fatal(t) {
		for call, more := 1+i%kittest.Step(4), true; more; call += kittest.Step(4) {
			check(t, n.pull(t, n.app))
			check(t, breaks["corrupt"](n.Blob(blob)))
			n.damage(t, n.app, 1)
			calls := 0
			c := n.repairer(t, grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				if changes(method) {
					if calls++; calls == call {
						_ = n.pull(t, n.app) // most cannot succeed
					}
				}
				return invoke(ctx, method, req, reply, conn, opts...)
			}))
			if err := n.dropUntilDone(t, c, n.options(t)); err != nil {
				t.Errorf("a pull before call %d: %v", call, err)
			}
			if n.usable(t, p, n.app); t.Failed() {
				t.Fatalf("blob %d, a pull before call %d of %d", i, call, calls)
			}
			more = calls >= call
		}
	}
}

// TestDropOvertaken: one Drop has verified, and another one and a pull are done before
// it goes on. It must leave alone what is whole by then.
func TestDropOvertaken(t *testing.T) {
	n := newNode(t)
	p := n.inUse(t)
	check(t, breaks["corrupt"](n.Blob(n.app.Layers[1].Digest)))
	n.damage(t, n.app, 1)
	leased := false
	c := n.repairer(t, grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if path.Base(method) == "Stat" && leased {
			leased = false
			if _, err := n.drop(t, n.app, 1); err != nil {
				t.Error(err)
			}
			if err := n.pull(t, n.app); err != nil {
				t.Error(err)
			}
		}
		leased = leased || path.Base(method) == "AddResource"
		return invoke(ctx, method, req, reply, conn, opts...)
	}))
	if done := must[repull.Dropped](t)(c.Drop(t.Context(), layer(n.app, 1), n.options(t))); !done.Nothing() {
		t.Errorf("overtaken by another one, Drop: %v", done)
	}
	if !n.present(t, n.app) {
		t.Error("the image is not listed")
	}
	check(t, p.run(t, n.app))
}

// fatal are the blobs of app that stop its pull when they are bad: one of a layer,
// and the two documents.
func (n *node) fatal(t testing.TB) []digest.Digest {
	t.Helper()
	return []digest.Digest{n.app.Layers[1].Digest, n.config(t, n.app), n.app.Manifest}
}

// dropUntilDone calls Drop again while pulls are in its way, as the daemon does. When
// a pull has brought what was bad, the daemon heals the layer, and drops nothing.
func (n *node) dropUntilDone(t *testing.T, c *repull.Containerd, o repull.Options) error {
	t.Helper()
	ctx, cancel := within(t)
	defer cancel()
	for {
		_, err := c.Drop(ctx, layer(n.app, 1), o)
		if good := (*repull.GoodBlobError)(nil); errors.As(err, &good) {
			n.between.answerWith(codes.OK)
			return nil
		}
		if !errdefs.IsUnavailable(err) || ctx.Err() != nil {
			return err
		}
	}
}

// TestDropDiscarded: with discard_unpacked_layers containerd keeps no blobs of
// layers, so that every damaged layer must be pulled again.
func TestDropDiscarded(t *testing.T) {
	n := newNodeWith(t, nodeOptions{images: "discard_unpacked_layers = true"})
	p := n.inUse(t)
	n.collect(t)
	for _, l := range n.app.Layers {
		if _, err := os.Lstat(n.Blob(l.Digest)); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("blob %s is kept: %v", l.Digest, err)
		}
	}
	lowest := n.backend(t, n.app)[0]
	n.between.answerWith(codes.FailedPrecondition, n.backend(t, n.app)[1:]...)
	must[repull.Dropped](t)(n.drop(t, n.app, 1))
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
	collect(t, n.Node)
}

func collect(t *testing.T, n *kit.Node) {
	t.Helper()
	must[string](t)(n.Ctr(t.Context(), "leases", "create", "--id", "collect"))
	must[string](t)(n.Ctr(t.Context(), "leases", "rm", "--sync", "collect"))
}

// TestDropSparesPull: a pull has written the name of its image, and has not unpacked yet,
// when a drop comes to the names. The name stays, and goes with the next drop if nothing
// has come of the pull.
func TestDropSparesPull(t *testing.T) {
	n := newNode(t)
	check(t, n.pull(t, n.app))
	check(t, n.repairer(t).Release(t.Context(), layer(n.app, 1))) // as the daemon does
	n.damage(t, n.app, 1)
	check(t, breaks["corrupt"](n.Blob(n.fatal(t)[0])))
	pulled := func() error {
		ctx, cl := n.client(t)
		img, err := cl.ImageService().Get(ctx, n.app.Ref)
		if err == nil {
			_, err = cl.ImageService().Update(ctx, img)
		}
		return err
	}
	once := sync.OnceValue(pulled)
	c := n.repairer(t, grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if strings.HasSuffix(method, "Snapshots/Remove") {
			check(t, once())
		}
		return invoke(ctx, method, req, reply, conn, opts...)
	}))
	if _, err := c.Drop(t.Context(), layer(n.app, 1), n.options(t)); !errdefs.IsUnavailable(err) {
		t.Errorf("Drop: %v", err)
	}
	if names := n.names(t, n.app); !slices.Contains(names, n.app.Ref) {
		t.Errorf("of the names there are %q", names)
	}
	n.collect(t)
	n.wantAnchored(t)
	must[repull.Dropped](t)(n.drop(t, n.app, 1))
	if names := n.names(t, n.app); len(names) > 0 {
		t.Errorf("after the next Drop there are %q", names)
	}
}

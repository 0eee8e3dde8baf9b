package readiness

import (
	"context"
	"errors"
	"fmt"
	"path"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestDropFailsAtEachStep: each call of Drop that changes something, in make test every third,
// fails in turn.
// While a name and the layer on the damaged one are left, no lease is; else at most one
// is. The damaged layer is there as long as a name is, also after a collection. The next
// Drop does the rest, also when it was a document of the image that was bad and has been
// deleted.
func TestDropFailsAtEachStep(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	check(t, n.pull(t, n.app))
	for i, blob := range n.fatal(t) {
		t.Run([]string{"layer", "config", "manifest"}[i], func(t *testing.T) {
			call := 1 + i%kittest.Step(3)
			for n.failsAt(t, blob, call) {
				call += kittest.Step(3)
			}
			if call < 15 {
				t.Errorf("Drop made only %d changes", call-1)
			}
		})
	}
}

// failsAt has the given call of a Drop fail, with a bad blob. It is false when Drop made
// fewer calls.
func (n *node) failsAt(t *testing.T, blob digest.Digest, call int) bool {
	t.Helper()
	check(t, n.pull(t, n.app))
	check(t, n.repairer(t).Release(t.Context(), layer(n.app, 1))) // as the daemon does
	n.damage(t, n.app, 1)
	check(t, breaks["corrupt"](n.Blob(blob)))
	calls, failed := 0, ""
	c := n.repairer(t, grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if changes(method) {
			if calls++; calls == call {
				failed = path.Base(path.Dir(method)) + "/" + path.Base(method)
				return status.Error(codes.Unavailable, "the connection broke")
			}
		}
		return invoke(ctx, method, req, reply, conn, opts...)
	}))
	_, err := c.Drop(t.Context(), layer(n.app, 1), n.options(t))
	if failed == "" {
		check(t, err)
		return false
	}
	if err == nil {
		t.Errorf("call %d, %s, failed, and Drop did not", call, failed)
	}
	ctx, cl := n.client(t)
	_, err = cl.SnapshotService("durable").Stat(ctx, n.app.Top())
	names, leases, above := n.names(t, n.app), n.dropLeases(t), !errdefs.IsNotFound(err)
	if len(names) > 0 && above && len(leases) > 0 || len(leases) > 1 {
		t.Errorf("call %d, %s, failed: names %q, leases %q", call, failed, names, leases)
	}
	n.collect(t)
	n.wantAnchored(t)
	must[repull.Dropped](t)(n.drop(t, n.app, 1))
	if names := n.names(t, n.app); len(names) > 0 {
		t.Errorf("call %d, %s, failed; after the next Drop there are %q", call, failed, names)
	}
	return true
}

// TestDropKilled: the daemon or containerd is killed before each step of a drop. In the
// end the image is there and runs, for a kubelet that pulls only what is not listed.
func TestDropKilled(t *testing.T) {
	t.Parallel()
	for first, victim := range []string{"daemon", "containerd"} {
		t.Run(victim, func(t *testing.T) {
			n := newNodeWith(t, nodeOptions{acts: true})
			p := n.inUse(t)
			// Each step of a drop begins with a Stat of the damaged layer, and
			// so does the pull that finds it.
			// In make test every third, others of one than of the other.
			for step := 1 + first%kittest.Step(3); ; step += kittest.Step(3) {
				old := n.backend(t, n.app)[1]
				n.lose(t, n.app)
				killed := n.killAt(t, victim, old, step)
				if err := n.pull(t, n.app); err == nil {
					t.Fatal("a pull succeeds without the layer")
				}
				sn := must[snapshots.Snapshotter](t)(n.Daemon.Snapshotter())
				waitFor(t, time.Minute, func() error {
					if _, err := sn.Stat(t.Context(), old); killed.Load() || errdefs.IsNotFound(err) {
						return nil
					}
					return errors.New("nothing was killed, and the layer was not dropped")
				})
				check(t, sn.Close())
				n.between.call(nil, nil)
				if !killed.Load() {
					if step < 8 {
						t.Errorf("a drop had only %d steps", step-1)
					}
					return
				}
				if victim == "daemon" {
					check(t, n.Daemon.Start(t.Context()))
				} else {
					n.restart(t)
				}
				n.wantAnchored(t)
				n.asKubelet(t, p, n.app)
				n.waitNoDropLease(t, fmt.Sprintf("step %d: the image runs", step))
			}
		})
	}
}

// killAt kills the daemon or containerd at the given call of Stat for the snapshot.
func (n *node) killAt(t *testing.T, victim, name string, call int) *atomic.Bool {
	killed, calls := &atomic.Bool{}, 0
	var mu sync.Mutex
	n.between.call(func(request any) {
		r, ok := request.(*snapshotsapi.StatSnapshotRequest)
		mu.Lock()
		defer mu.Unlock()
		if !ok || r.Key != name || killed.Load() {
			return
		}
		if calls++; calls < call {
			return
		}
		p := n.Daemon.Process
		if victim == "containerd" {
			p = n.Containerd.Process
		}
		if err := p.Kill(); err != nil {
			t.Error(err)
		}
		killed.Store(true)
	}, nil)
	return killed
}

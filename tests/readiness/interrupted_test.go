package readiness

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"google.golang.org/grpc"

	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

var errCut = errors.New("the power went")

// cutAfter makes a connection end after so many calls that change something. The
// last one is made, and its answer lost.
type cutAfter struct {
	left int
	last string // the method
}

func (c *cutAfter) intercept(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, call grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if c.left == 0 {
		return errCut
	}
	err := call(ctx, method, req, reply, conn, opts...)
	if changes(method) {
		c.last = method
		if c.left--; c.left == 0 {
			return errCut
		}
	}
	return err
}

// changes reports which calls of Drop change something.
func changes(method string) bool {
	return slices.Contains([]string{"Create", "AddResource", "Delete", "Remove", "Prepare"}, path.Base(method))
}

// TestDropInterrupted: Drop is cut short after each of its changes in turn, and
// containerd is killed. The next Drop does the rest, and the next pull mends all. In
// between the image may be listed, but then the damaged layer is there, by which it is
// found again.
func TestDropInterrupted(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	check(t, n.pull(t, n.pause))
	p := must[*pod](t)(n.startPod(t))
	for calls := 1; ; calls += kittest.Step(3) {
		check(t, n.pull(t, n.app))
		old := n.backend(t, n.app)[1]
		n.damage(t, n.app, 1)
		check(t, breaks["corrupt"](n.Blob(n.app.Layers[1].Digest)))

		cut := &cutAfter{left: calls}
		_, err := n.repairer(t, grpc.WithChainUnaryInterceptor(cut.intercept)).Drop(t.Context(), layer(n.app, 1), n.options(t))
		if err == nil {
			if calls < 12 {
				t.Fatalf("Drop made only %d changes", calls-1)
			}
			return
		}
		t.Run(fmt.Sprintf("%d,%s", calls, path.Base(cut.last)), func(t *testing.T) {
			check(t, n.Containerd.Kill())
			n.restart(t)
			n.wantAnchored(t)
			must[repull.Dropped](t)(n.drop(t, n.app, 1))
			n.waitKnown(t, n.app, false)
			if names := n.names(t, n.app); len(names) > 0 {
				t.Errorf("left of the image: %q", names)
			}
			if l := n.dropLeases(t); len(l) > 1 {
				t.Errorf("leases of one layer: %q", l)
			}
			if rows := n.rows(t); slices.Contains(rows, old) {
				t.Errorf("the damaged snapshot is still there: %q", rows)
			}
			n.usable(t, p, n.app)
		})
	}
}

// rows are the daemon's own names of its snapshots.
func (n *node) rows(t testing.TB) (names []string) {
	t.Helper()
	sn := must[snapshots.Snapshotter](t)(n.Daemon.Snapshotter())
	defer sn.Close()
	check(t, sn.Walk(t.Context(), func(_ context.Context, info snapshots.Info) error {
		names = append(names, info.Name)
		return nil
	}))
	return names
}

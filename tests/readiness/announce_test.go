package readiness

import (
	"context"
	"slices"
	"strings"
	"testing"

	containerdimages "github.com/containerd/containerd/v2/core/images"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
)

// TestAnnounce: an image that was not whole when containerd started, and has been
// healed since, is known to the CRI plugin again without a pull. One that is not
// whole is not announced.
func TestAnnounce(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	p := n.inUse(t)
	check(t, n.GoOffline())
	n.damage(t, n.app, 1)
	n.restart(t)
	if n.present(t, n.app) {
		t.Fatal("the image is known after a restart, although it is not whole")
	}
	announce := func() []string {
		t.Helper()
		listed := 0
		c := n.repairer(t, grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, call grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			if strings.HasSuffix(method, "Content/List") {
				listed++
			}
			return call(ctx, desc, conn, method, opts...)
		}))
		names := must[[]string](t)(c.Announce(t.Context(), []repull.Layer{layer(n.app, 0), layer(n.app, 1), layer(n.app, 2)}))
		if listed != 1 {
			t.Errorf("the content store was listed %d times for three layers", listed)
		}
		return names
	}
	label := func() string {
		t.Helper()
		ctx, cl := n.client(t)
		return must[containerdimages.Image](t)(cl.ImageService().Get(ctx, n.app.Ref)).Labels["durable-snapshotter/healed"]
	}
	if names := announce(); len(names) > 0 {
		t.Errorf("announced %q, which is not whole", names)
	}
	n.between.answerWith(codes.OK)
	if names := announce(); len(names) != 3 || !slices.Contains(names, n.app.Ref) {
		t.Errorf("announced %q, want the three names of %s", names, n.app.Ref)
	}
	n.waitKnown(t, n.app, true)
	check(t, p.run(t, n.app))
	// Within the same second, too.
	first := label()
	announce()
	if second := label(); first == "" || second == first {
		t.Errorf("the label is %q, and was %q before", second, first)
	}
}

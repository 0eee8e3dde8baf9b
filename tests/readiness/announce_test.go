package readiness

import (
	"slices"
	"testing"

	"google.golang.org/grpc/codes"
)

// TestAnnounce: an image that was not whole when containerd started, and has been
// healed since, is known to the CRI plugin again without a pull. One that is not
// whole is not announced.
func TestAnnounce(t *testing.T) {
	n := newNode(t)
	p := n.inUse(t)
	check(t, n.stopRegistry())
	n.damage(t, n.app, 1)
	n.restart(t)
	if n.present(t, n.app) {
		t.Fatal("the image is known after a restart, although it is not whole")
	}
	announce := func() []string {
		t.Helper()
		return must[[]string](t)(n.repairer(t).Announce(t.Context(), layer(n.app, 1)))
	}
	if names := announce(); len(names) > 0 {
		t.Errorf("announced %q, which is not whole", names)
	}
	n.between.say(codes.OK)
	if names := announce(); len(names) != 3 || !slices.Contains(names, n.app.Ref) {
		t.Errorf("announced %q, want the three names of %s", names, n.app.Ref)
	}
	n.waitKnown(t, n.app, true)
	check(t, p.run(t, n.app))
}

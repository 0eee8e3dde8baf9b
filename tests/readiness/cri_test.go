package readiness

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// The kubelet's calls of the CRI plugin, one function each.

func within(t testing.TB) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), 3*time.Minute)
}

// pull pulls as the kubelet does.
func (n *node) pull(t testing.TB, img kit.Pushed) error {
	t.Helper()
	return n.CRI.Pull(t.Context(), img.Ref)
}

func (n *node) known(t testing.TB, img kit.Pushed) bool {
	t.Helper()
	return must[bool](t)(n.CRI.Known(t.Context(), img.Ref))
}

func (n *node) waitKnown(t testing.TB, img kit.Pushed, want bool) {
	t.Helper()
	check(t, n.CRI.WaitKnown(t.Context(), img.Ref, want))
}

// present is known, and verifies that the list of images agrees. The
// two are two calls, so nothing may change meanwhile.
func (n *node) present(t testing.TB, img kit.Pushed) bool {
	t.Helper()
	ctx, cancel := within(t)
	defer cancel()
	known := n.known(t, img)
	list := must[*runtimeapi.ListImagesResponse](t)(n.CRI.Images.ListImages(ctx, &runtimeapi.ListImagesRequest{}))
	listed := slices.ContainsFunc(list.Images, func(i *runtimeapi.Image) bool { return slices.Contains(i.RepoTags, img.Ref) })
	if known != listed {
		t.Errorf("ImageStatus of %s reports %v, ListImages %v", img.Ref, known, list.Images)
	}
	return known
}

// pod is a sandbox whose containers run the guest.
type pod struct{ *kit.Pod }

// startPod starts a sandbox, which is removed with all its containers after the
// test.
func (n *node) startPod(t testing.TB) (*pod, error) {
	t.Helper()
	p, err := n.CRI.StartPod(t.Context())
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { (&pod{p}).remove(t) })
	return &pod{p}, nil
}

// inUse pulls both images and starts a pod: a node at work.
func (n *node) inUse(t testing.TB) *pod {
	t.Helper()
	check(t, n.pull(t, n.pause))
	check(t, n.pull(t, n.app))
	return must[*pod](t)(n.startPod(t))
}

// remove removes a sandbox. Doing it twice is no error.
func (p *pod) remove(t testing.TB) {
	t.Helper()
	if err := p.Remove(context.Background()); err != nil { // the test's own may have ended
		t.Error(err)
	}
}

// create creates a container that runs the guest with args.
func (p *pod) create(t testing.TB, img kit.Pushed, args ...string) (string, error) {
	t.Helper()
	return p.Create(t.Context(), img.Ref, append([]string{"/bin/guest"}, args...)...)
}

func (p *pod) start(t testing.TB, id string) error {
	t.Helper()
	return p.Start(t.Context(), id)
}

// removeContainer removes a container, running or not, and its snapshot.
func (p *pod) removeContainer(t testing.TB, id string) {
	t.Helper()
	check(t, p.RemoveContainer(t.Context(), id))
}

// run runs a container to its end. It reads a file of the lowest layer that is
// changed by the top one, with the program of the middle one, so it fails unless
// the whole image is there.
func (p *pod) run(t testing.TB, img kit.Pushed) error {
	t.Helper()
	id, err := p.create(t, img, "cat", "/etc/motd")
	if err != nil {
		return err
	}
	defer p.removeContainer(t, id)
	if err := p.start(t, id); err != nil {
		return err
	}
	if code := must[int32](t)(p.Wait(t.Context(), id)); code != 0 {
		return fmt.Errorf("container ended with %d", code)
	}
	return nil
}

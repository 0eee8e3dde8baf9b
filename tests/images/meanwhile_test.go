package images

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestGoodMeanwhile: a layer under a running container cannot be healed, because its blob is
// bad. While the same repair heals the layer of another image, the blob becomes good: the
// daemon has had it fetched, for example. The repair ends with both layers healed.
func TestGoodMeanwhile(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	used, other := n.pull(t, "used"), n.pull(t, "other") // healed in this order
	p := must[*kit.Pod](t)(n.CRI.StartPod(t.Context()))
	defer func() { check(t, p.Remove(context.WithoutCancel(t.Context()))) }()
	n.start(t, p, used, true)
	for _, img := range []kit.Pushed{used, other} {
		damages["removed"](t, n, img)
	}
	blob := n.Blob(used.Layers[1].Digest)
	good := must[[]byte](t)(os.ReadFile(blob))
	blobs["corrupt"](t, blob)

	syncs := kittest.HoldSyncs(t, n.Daemon.PID())
	ended := make(chan results)
	go func() {
		defer close(ended)
		all, _ := n.images(t, "repair", "--deep", "--apply", used.Ref, other.Ref)
		ended <- all
	}()
	kittest.WaitFor(t, time.Minute, func() error {
		if log := must[string](t)(n.Daemon.Log()); !strings.Contains(log, `"event":"layer_not_healed"`) {
			return errors.New("no layer was tried")
		}
		return nil
	})
	check(t, os.WriteFile(blob, good, 0o644))
	syncs.Release()
	all := <-ended
	for _, img := range []kit.Pushed{used, other} {
		if r := all.of(t, img); r.Verdict != "ready" {
			t.Errorf("%s: %s (%s; done: %s; blocked: %s), want ready", img.Ref, r.Verdict, r.Reason, r.Done, r.Blocked)
		}
	}
}

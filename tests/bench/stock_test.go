package bench

import (
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// builtin serves containerd's own overlayfs snapshotter until the benchmark ends. Machines
// differ and are noisy: what is compared with it in the same run means something on all of
// them.
func builtin(b *testing.B, root string) snapshots.Snapshotter {
	b.Helper()
	stock := kittest.Must[*kit.Stock](b)(kit.NewStock(b.Context(), root, scratch(b)))
	kittest.Check(b, stock.Start(b.Context()))
	b.Cleanup(func() { kittest.Stop(b, stock.Process) })
	sn := kittest.Must[snapshots.Snapshotter](b)(stock.Snapshotter())
	b.Cleanup(func() { sn.Close() })
	return sn
}

func median(took []time.Duration) time.Duration {
	return slices.Sorted(slices.Values(took))[len(took)/2]
}

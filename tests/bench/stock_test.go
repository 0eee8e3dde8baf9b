package bench

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
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

// quantile returns the duration below which the part q of them is.
func quantile(took []time.Duration, q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(took))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func median(took []time.Duration) time.Duration { return quantile(took, 0.5) }

// copyFile copies a file of a stopped snapshotter.
func copyFile(b *testing.B, from, to string) {
	b.Helper()
	data, err := os.ReadFile(from)
	if err == nil {
		err = errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, data, 0o600))
	}
	if err != nil {
		b.Fatal(fmt.Errorf("copy %s: %w", from, err))
	}
}

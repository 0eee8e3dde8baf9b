package bench

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// statsAtATime is how many Stats of one snapshotter follow one another before it
// is the other's turn.
const statsAtATime = 500

// benchmarkStat measures Stat of ready layers over gRPC, as containerd calls it, in
// turn with the built-in overlayfs, which has the same rows: layers in chains of
// the usual length, and those of the deep chain.
func (n *node) benchmarkStat(b *testing.B) {
	ours, theirs := kittest.Connect(b, n.daemon), builtin(b, n.builtin)
	for _, layers := range []struct {
		depth string
		names []string
	}{{"10", n.layers[deepest:]}, {"100", n.layers[deepest-1 : deepest]}} {
		b.Run("depth="+layers.depth, func(b *testing.B) {
			r := rand.New(rand.NewPCG(1, 2))
			stat(b, ours, layers.names, r, 100) // connect
			stat(b, theirs, layers.names, r, 100)
			var durable, overlayfs []time.Duration
			for b.Loop() {
				durable = append(durable, stat(b, ours, layers.names, r, statsAtATime)...)
				overlayfs = append(overlayfs, stat(b, theirs, layers.names, r, statsAtATime)...)
			}
			b.ReportMetric(micros(median(durable)), "p50-µs")
			b.ReportMetric(micros(quantile(durable, 0.99)), "p99-µs")
			b.ReportMetric(micros(median(overlayfs)), "overlayfs-p50-µs")
			b.ReportMetric(micros(quantile(overlayfs, 0.99)), "overlayfs-p99-µs")
			b.ReportMetric(float64(median(durable))/float64(median(overlayfs)), "durable/overlayfs")
		})
	}
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// stat calls Stat of random layers, one after the other.
func stat(b *testing.B, sn snapshots.Snapshotter, names []string, r *rand.Rand, times int) (took []time.Duration) {
	b.Helper()
	for range times {
		name := names[r.IntN(len(names))]
		start := time.Now()
		info, err := sn.Stat(b.Context(), name)
		took = append(took, time.Since(start))
		if err != nil || info.Name != name {
			b.Fatal(info, err)
		}
	}
	return took
}

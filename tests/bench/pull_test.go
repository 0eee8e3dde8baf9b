package bench

import (
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// BenchmarkPull pulls the large image with the built-in overlayfs and with the
// daemon in turn, on one disk. Machines are noisy, so the figure is the ratio
// of the medians; the time per operation is that of both pulls.
func BenchmarkPull(b *testing.B) { pulls(b, kit.NodeOptions{}) }

// BenchmarkPullDiffer is BenchmarkPull with our differ for durable.
func BenchmarkPullDiffer(b *testing.B) {
	pulls(b, kit.NodeOptions{Heals: true, Containerd: kit.ContainerdOptions{Differ: []string{"durable"}}})
}

func pulls(b *testing.B, o kit.NodeOptions) {
	s := kittest.StartNode(b, o)
	img := images.Get(b, "large")
	took := map[string][]time.Duration{}
	for b.Loop() {
		for _, sn := range []string{"overlayfs", "durable"} {
			start := time.Now()
			kittest.Pull(b, s, sn, img.Ref)
			took[sn] = append(took[sn], time.Since(start))
			b.StopTimer()
			kittest.Ctr(b, s, "image", "rm", "--sync", img.Ref)
			kittest.Ctr(b, s, "content", "prune", "references")
			b.StartTimer()
		}
	}
	durable, overlayfs := median(took["durable"]).Seconds(), median(took["overlayfs"]).Seconds()
	b.ReportMetric(float64(img.Bytes>>20), "MiB")
	b.ReportMetric(overlayfs, "overlayfs-s")
	b.ReportMetric(durable, "durable-s")
	b.ReportMetric(durable/overlayfs, "durable/overlayfs")
}

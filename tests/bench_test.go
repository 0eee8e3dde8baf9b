package tests

import (
	"testing"
	"time"
)

// BenchmarkPull pulls the large image with the built-in overlayfs and with the
// daemon in turn, on one disk. Machines are noisy, so the figure is the ratio
// of the medians; the time per operation is that of both pulls.
func BenchmarkPull(b *testing.B) {
	s := newStack(b, stackOptions{})
	img := image(b, "large")
	took := map[string][]time.Duration{}
	for b.Loop() {
		for _, sn := range []string{"overlayfs", "durable"} {
			start := time.Now()
			s.pull(b, "transfer", sn, img)
			took[sn] = append(took[sn], time.Since(start))
			b.StopTimer()
			s.ctr(b, "image", "rm", "--sync", img.Ref)
			s.ctr(b, "content", "prune", "references")
			b.StartTimer()
		}
	}
	durable, overlayfs := median(took["durable"]).Seconds(), median(took["overlayfs"]).Seconds()
	b.ReportMetric(float64(img.Bytes>>20), "MiB")
	b.ReportMetric(overlayfs, "overlayfs-s")
	b.ReportMetric(durable, "durable-s")
	b.ReportMetric(durable/overlayfs, "durable/overlayfs")
}

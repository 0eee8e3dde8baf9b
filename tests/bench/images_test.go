package bench

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// BenchmarkCheckImages examines 200 images with two layers, each of which shares its lower
// one with 19 others. The memory is the most that the program has had, beside the daemon's
// and containerd's.
func BenchmarkCheckImages(b *testing.B) {
	const count, sharing = 200, 20
	r, err := kit.StartRegistry(scratch(b))
	if err != nil {
		b.Fatal(err)
	}
	n := kittest.StartNode(b, kit.NodeOptions{Registry: r, Heals: true, Notifies: true})
	for i := range count {
		base, own := fmt.Sprint("base ", i/sharing), fmt.Sprint("own ", i)
		img, err := n.Push(b.Context(), fmt.Sprint("image", i), kit.Image{Layers: []kit.Layer{
			kit.NewLayer(kit.Gzip, kit.Dir("base", 0o755), kit.File("base/name", 0o644, base), kit.File("base/large", 0o644, strings.Repeat(base, 1<<16))),
			kit.NewLayer(kit.Gzip, kit.Dir("own", 0o755), kit.File("own/name", 0o644, own)),
		}})
		if err != nil {
			b.Fatal(err)
		}
		kittest.Pull(b, n, "durable", img.Ref)
	}
	for _, args := range [][]string{{"--images"}, {"--images", "--deep"}} {
		b.Run(strings.TrimLeft(strings.Join(args, ""), "-"), func(b *testing.B) {
			var took []time.Duration
			memory := int64(0)
			for b.Loop() {
				argv := append(n.Daemon.Argv(), append(args, "--json")...)
				argv[slices.Index(argv, "serve")] = "check"
				cmd := exec.CommandContext(b.Context(), argv[0], argv[1:]...)
				start := time.Now()
				out, err := cmd.Output()
				if err != nil {
					b.Fatal(err, string(out))
				}
				took = append(took, time.Since(start))
				memory = max(memory, cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss)
				var found []struct{ Verdict string }
				if err := json.Unmarshal(out, &found); err != nil {
					b.Fatal(err)
				}
				ready := 0
				for _, i := range found {
					if i.Verdict == "ready" {
						ready++
					}
				}
				if ready != count || len(found) != count {
					b.Fatalf("%d of %d images are ready, want %d", ready, len(found), count)
				}
			}
			b.ReportMetric(median(took).Seconds(), "check-s")
			b.ReportMetric(float64(memory)/1024, "MiB")
		})
	}
}

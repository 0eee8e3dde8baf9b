package bench

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// BenchmarkCommit measures Commit of a layer of 30,000 entries over gRPC, in turn
// with what the built-in overlayfs would need for the same safety: a syncfs and
// its own Commit. What is on top is the price of the seal, and of reading and
// writing the marks of overlayfs.
//
// Either the layer was synced before, and Commit has little to flush, as it is
// meant to be, or everything was written just now.
func BenchmarkCommit(b *testing.B) {
	disk := newDisk(b, kit.DiskOptions{Size: 8 << 30})
	daemon := kittest.StartDaemon(b, kit.DaemonOptions{Dir: disk.Path("durable"), RunDir: scratch(b)})
	ours, theirs := kittest.Connect(b, daemon), builtin(b, disk.Path("overlayfs"))
	for _, before := range []string{"synced", "dirty"} {
		b.Run("entries=30000/layer="+before, func(b *testing.B) {
			var durable, overlayfs, flush []time.Duration
			for b.Loop() {
				whole, _ := commitLarge(b, disk, ours, before == "synced", false)
				stock, sync := commitLarge(b, disk, theirs, before == "synced", true)
				durable, overlayfs, flush = append(durable, whole), append(overlayfs, stock), append(flush, sync)
			}
			ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
			b.ReportMetric(0, "ns/op") // making and removing layers is not the point
			b.ReportMetric(ms(median(durable)), "commit-ms")
			b.ReportMetric(ms(median(overlayfs)), "overlayfs+syncfs-ms")
			b.ReportMetric(ms(median(flush)), "its-syncfs-ms")
			b.ReportMetric(ms(median(durable)-median(overlayfs)), "added-ms")
			b.ReportMetric(float64(median(durable))/float64(median(overlayfs)), "durable/overlayfs")
		})
	}
}

// commitLarge extracts a layer of 30,000 entries, commits it, and removes it. It
// returns the time of the Commit, with that of a syncfs before it on request.
func commitLarge(b *testing.B, disk *kit.Disk, sn snapshots.Snapshotter, synced, syncfs bool) (commit, sync time.Duration) {
	b.Helper()
	ctx := b.Context()
	key := fmt.Sprintf("extract-%d sha256:%064x", time.Now().UnixNano(), 1)
	mounts, err := sn.Prepare(ctx, key, "")
	if err != nil {
		b.Fatal(err)
	}
	if err := writeLargeLayer(upperOf(mounts)); err != nil {
		b.Fatal(err)
	}
	if synced {
		syncDisk(b, disk)
	}
	start := time.Now()
	if syncfs {
		syncDisk(b, disk)
		sync = time.Since(start)
	}
	if err := sn.Commit(ctx, "large", key); err != nil {
		b.Fatal(err)
	}
	commit = time.Since(start)
	usage, err := sn.Usage(ctx, "large")
	if err != nil || usage.Inodes != 30_000 {
		b.Fatal(usage, err)
	}
	if err := sn.Remove(ctx, "large"); err != nil {
		b.Fatal(err)
	}
	if err := sn.(snapshots.Cleaner).Cleanup(ctx); err != nil {
		b.Fatal(err)
	}
	syncDisk(b, disk) // or the next one pays for it
	return commit, sync
}

// writeLargeLayer makes 30,000 entries with the root: 298 directories, with 100
// small files in each but the last.
func writeLargeLayer(root string) error {
	content := make([]byte, 300)
	entries := 1
	for d := 0; entries < 30_000; d++ {
		dir := filepath.Join(root, fmt.Sprintf("dir-%03d", d))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		entries++
		for f := 0; f < 100 && entries < 30_000; f++ {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("file-%03d", f)), content, 0o644); err != nil {
				return err
			}
			entries++
		}
	}
	return nil
}

// upperOf is the directory into which an extraction writes.
func upperOf(mounts []mount.Mount) string {
	for _, o := range mounts[0].Options {
		if upper, ok := strings.CutPrefix(o, "upperdir="); ok {
			return upper
		}
	}
	return mounts[0].Source
}

func syncDisk(b *testing.B, disk *kit.Disk) {
	b.Helper()
	kittest.Check(b, disk.Sync())
}

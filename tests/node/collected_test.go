package node

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// usage are the kernel's figures of the file system of a directory, in bytes.
func usage(t *testing.T, dir string) (capacity, available uint64) {
	t.Helper()
	var st unix.Statfs_t
	check(t, unix.Statfs(dir, &st))
	return st.Blocks * uint64(st.Bsize), st.Bavail * uint64(st.Bsize)
}

// near reports whether two figures differ by less than a twentieth.
func near(a, b uint64) bool { return max(a, b)-min(a, b) < max(a, b)/20 }

// TestCollected has the kubelet collect an image that no pod uses, because a disk
// is full that has nothing but the daemon's root. Collection runs every five
// minutes, which is compiled into the kubelet.
func TestCollected(t *testing.T) {
	const big = 200 << 20 // bytes of the image's own layer
	disk := kittest.NewDisk(t, kit.DiskOptions{Size: 512 << 20})
	n := newNode(t, options{
		snapshotter: durable, policy: never, daemonDir: disk.Path("durable"),
		kubelet: "imageGCHighThresholdPercent: 30\nimageGCLowThresholdPercent: 20\n",
	})
	noise := make([]byte, big)
	random := rand.NewChaCha8([32]byte{13, 8})
	_ = must[int](t)(random.Read(noise))
	unused := must[kit.Pushed](t)(n.Push(t.Context(), "unused", kit.Image{Layers: []kit.Layer{
		kit.NewLayer(kit.Plain, kit.File("noise", 0o644, string(noise))),
	}}))
	_, empty := usage(t, disk.Path())
	check(t, n.CRI.Pull(t.Context(), unused.Ref))
	rows := kittest.Inspect(t, n.Daemon).Snapshots
	at := slices.IndexFunc(rows, func(r kit.Row) bool { return strings.HasSuffix(r.Name, "/"+unused.Top()) })
	if at < 0 {
		t.Fatal("the daemon has no row of the unused image")
	}
	layer := n.Daemon.SnapshotDir(rows[at].ID)
	before := n.trees(t)

	info := must[*runtimeapi.ImageFsInfoResponse](t)(n.CRI.Images.ImageFsInfo(t.Context(), &runtimeapi.ImageFsInfoRequest{}))
	if len(info.ImageFilesystems) != 1 || info.ImageFilesystems[0].FsId.GetMountpoint() != n.Daemon.Root {
		t.Errorf("ImageFsInfo reports %v, want %s", info.ImageFilesystems, n.Daemon.Root)
	}
	check(t, n.kubelet.Start(t.Context()))
	pods := n.run(t)
	capacity, available := usage(t, disk.Path())
	if percent := 100 - available*100/capacity; percent < 30 {
		t.Fatalf("%d%% of the disk are used: no reason to collect", percent)
	}
	// The plugin measures what snapshots use every ten seconds.
	waitFor(t, 2*time.Minute, func() error {
		f, err := n.kubelet.ImageFs(t.Context())
		if err == nil && (f.CapacityBytes != capacity || !near(f.AvailableBytes, available) || f.UsedBytes < big || f.UsedBytes > capacity-available) {
			err = fmt.Errorf("/stats/summary reports %+v, the kernel a capacity of %d and %d available", f, capacity, available)
		}
		return err
	})
	if !must[bool](t)(n.CRI.Known(t.Context(), unused.Ref)) {
		t.Error("the unused image is gone before a round of collection was due")
	}

	waitFor(t, 4*time.Minute, func() error {
		if _, err := os.Stat(layer); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("the layer of the unused image: %v", err)
		}
		return nil
	})
	if must[bool](t)(n.CRI.Known(t.Context(), unused.Ref)) {
		t.Error("the layer is gone, and the CRI plugin still knows the image")
	}
	if _, after := usage(t, disk.Path()); after < available+big || !near(after, empty) {
		t.Errorf("%d bytes were available before the image was pulled, %d with it, %d after it was collected", empty, available, after)
	}
	n.whole(t, before)
	if after := n.run(t); !maps.Equal(pods, after) {
		t.Errorf("the collection has changed the pods: %v, before it %v", after, pods)
	}
}

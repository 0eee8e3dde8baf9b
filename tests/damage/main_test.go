package damage

import (
	"os"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// fileSystems under test, each on a disk of its own.
var fileSystems = []string{"ext4", "xfs", "btrfs"}

// registry has the image. It lives as long as the run.
var registry *kit.Registry

func TestMain(m *testing.M) {
	// No power is cut here, and a disk that syncs fast leaves time for more cases.
	os.Exit(kit.Main(func() int {
		return kit.InMemory(func() int {
			return kit.WithRegistry(func(r *kit.Registry) int {
				registry = r
				return m.Run()
			})
		})
	}))
}

var (
	check   = kittest.Check
	waitFor = kittest.WaitFor
	scratch = kittest.Scratch
)

func must[T any](t testing.TB) func(T, error) T { return kittest.Must[T](t) }

func newDisk(t testing.TB, fs string) *kit.Disk {
	t.Helper()
	return kittest.NewDisk(t, kit.DiskOptions{FS: fs})
}

// startDaemon starts the daemon alone on a disk.
func startDaemon(t testing.TB, disk *kit.Disk, o kit.DaemonOptions) *kit.Daemon {
	t.Helper()
	o.Dir = disk.Path("durable")
	return kittest.StartDaemon(t, o)
}

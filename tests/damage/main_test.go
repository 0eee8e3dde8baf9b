package damage

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// fileSystems under test, each on a disk of its own.
var fileSystems = []string{"ext4", "xfs", "btrfs"}

// registry has the image. It lives as long as the run.
var registry *kit.Registry

// containerd's mount package gives a thread another working directory when the
// options of a mount are long, and ends the thread afterwards. The main thread
// cannot end: it would stay there for ever, and keep the disk from being
// unmounted. Locked here, it only ever runs TestMain.
func init() { runtime.LockOSThread() }

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

// witnessBinary is the program of the image.
var witnessBinary = sync.OnceValues(func() (string, error) {
	tests, err := kit.Module(context.Background())
	if err != nil {
		return "", err
	}
	file := filepath.Join(os.TempDir(), "witness")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", file, "./damage/witness")
	cmd.Dir, cmd.Env = tests, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build witness: %w: %s", err, out)
	}
	return file, nil
})

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

// startDaemon starts the daemon on a disk. It tells containerd nothing: where a
// blob is bad, containerd would be made to forget the image, and there would be
// nothing left to look at.
func startDaemon(t testing.TB, disk *kit.Disk, o kit.DaemonOptions) *kit.Daemon {
	t.Helper()
	o.Dir = disk.Path("durable")
	return kittest.StartDaemon(t, o)
}

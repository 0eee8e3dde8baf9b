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
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
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
	os.Exit(kit.Main(func() int {
		code, err := run(m)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return code
	}))
}

// run keeps disks, registry and everything else in a tmpfs, which goes with the
// namespace that kit.Main makes: no power is cut here, and a disk that syncs
// fast leaves time for more cases.
func run(m *testing.M) (code int, err error) {
	dir, err := os.MkdirTemp("", "m")
	if err != nil {
		return 1, err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8g"); err != nil {
		return 1, os.NewSyscallError("mount", err)
	}
	if err := os.Setenv("TMPDIR", dir); err != nil {
		return 1, err
	}
	if registry, err = kit.StartRegistry(filepath.Join(dir, "registry")); err != nil {
		return 1, err
	}
	code = m.Run()
	return code, registry.Close()
}

// The programs under test, built at the first use.
var binaries = sync.OnceValues(func() (kit.Binaries, error) { return kit.Build(context.Background()) })

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

// must returns a function that unwraps a result and ends the test on an error.
func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// waitFor polls until ok returns nil, less and less often, and fails with its
// last error.
func waitFor(t testing.TB, limit time.Duration, ok func() error) {
	t.Helper()
	pause := 20 * time.Millisecond
	for deadline := time.Now().Add(limit); ; time.Sleep(pause) {
		pause = min(pause*5/4, 300*time.Millisecond)
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", limit, err)
		}
	}
}

// scratch is a directory with a short name: the path of a unix socket has room
// for 107 bytes, and t.TempDir spells out the test's whole name.
func scratch(t testing.TB) string {
	t.Helper()
	dir := must[string](t)(os.MkdirTemp("", "t"))
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func newDisk(t testing.TB, fs string) *kit.Disk {
	t.Helper()
	d := must[*kit.Disk](t)(kit.NewDisk(filepath.Join(scratch(t), "disk"), kit.DiskOptions{FS: fs}))
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// startDaemon starts the daemon on a disk and stops it in the orderly way after
// the test. It tells containerd nothing: where a blob is bad, containerd would be
// made to forget the image, and there would be nothing left to look at.
func startDaemon(t testing.TB, disk *kit.Disk, o kit.DaemonOptions) *kit.Daemon {
	t.Helper()
	o.Binary, o.Dir, o.RunDir = must[kit.Binaries](t)(binaries()).Daemon, disk.Path("durable"), scratch(t)
	d := must[*kit.Daemon](t)(kit.StartDaemon(t.Context(), o))
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(d.LogTail(6000))
		}
		if !d.Running() {
			return
		}
		if err := d.Stop(); err != nil {
			t.Error(err)
		}
	})
	return d
}

package overlay

import (
	"context"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

var (
	images = flag.Int("images", 300, "images that the differential test generates")
	seed   = flag.Uint64("seed", 5, "of the generated images")
	single = flag.Int("image", -1, "number of the only image to test")
	limit  = flag.Int("failures", 3, "images that fail before a file system is given up")
	only   = flag.String("way", "", "unpack only in the ways whose names start so")
)

func TestMain(m *testing.M) {
	flag.Parse()
	// The applier runs in this process, and warns of every xattr it leaves out.
	logrus.SetOutput(io.Discard)
	_ = log.SetLevel("panic")
	os.Exit(kit.Main(m.Run))
}

var binaries = sync.OnceValues(func() (kit.Binaries, error) { return kit.Build(context.Background()) })

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

// memory is a tmpfs for disks and databases: what is tested here is what layers
// mean, not how long a disk takes to sync them. It goes with the namespace that
// kit.Main makes.
var memory = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "m")
	if err != nil {
		return "", err
	}
	return dir, os.NewSyscallError("mount", unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8g"))
})

// scratch is a directory in memory. Its name is short: the path of a unix socket
// has room for 107 bytes, and t.TempDir spells out the test's whole name.
func scratch(t testing.TB) string {
	t.Helper()
	dir := must[string](t)(os.MkdirTemp(must[string](t)(memory()), "t"))
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

// startDaemon starts the daemon on a directory of a disk and stops it in the
// orderly way after the test.
func startDaemon(t testing.TB, binary, dir, config string) *kit.Daemon {
	t.Helper()
	d := must[*kit.Daemon](t)(kit.StartDaemon(t.Context(), kit.DaemonOptions{
		Binary: binary, Dir: dir, RunDir: scratch(t), Config: config,
	}))
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(d.LogTail(4000))
		}
		if d.Running() {
			if err := d.Stop(); err != nil {
				t.Error(err)
			}
		}
	})
	return d
}

// indent makes a listing stand out in a failure message.
func indent(text string) string {
	return "    " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n    ")
}

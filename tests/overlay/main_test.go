package overlay

import (
	"flag"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

var (
	images = flag.Int("images", 100, "images that the differential test generates")
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
	// What is tested here is what layers mean, not how long a disk takes to sync
	// them.
	os.Exit(kit.Main(func() int { return kit.InMemory(m.Run) }))
}

var (
	check   = kittest.Check
	scratch = kittest.Scratch
)

func must[T any](t testing.TB) func(T, error) T { return kittest.Must[T](t) }

func newDisk(t testing.TB, fs string) *kit.Disk {
	t.Helper()
	return kittest.NewDisk(t, kit.DiskOptions{FS: fs})
}

// startDaemon starts the daemon on a directory of a disk.
func startDaemon(t testing.TB, binary, dir, config string) *kit.Daemon {
	t.Helper()
	return kittest.StartDaemon(t, kit.DaemonOptions{Binary: binary, Dir: dir, Config: config})
}

// indent makes a listing stand out in a failure message.
func indent(text string) string {
	return "    " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n    ")
}

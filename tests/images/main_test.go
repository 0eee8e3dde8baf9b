package images

import (
	"flag"
	"os"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

func TestMain(m *testing.M) {
	flag.Parse()
	// A cut is the shutdown of a file system; its disk may be in memory.
	os.Exit(kit.Main(func() int { return kit.InMemory(m.Run) }))
}

var (
	check   = kittest.Check
	scratch = kittest.Scratch
)

func must[T any](t testing.TB) func(T, error) T { return kittest.Must[T](t) }

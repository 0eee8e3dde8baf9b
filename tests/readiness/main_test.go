package readiness

import (
	"flag"
	"os"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/defects"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

var update = flag.Bool("update", false, "write testdata/answers.txt from what this run has seen")

func TestMain(m *testing.M) {
	// A test is alone if it depends on how soon an answer comes, or lets the machine boot.
	kit.Parallel(3)
	// What is tested here is who says what about a layer, not how long a disk takes
	// to sync it.
	os.Exit(kit.Main(func() int { return kit.InMemory(m.Run) }))
}

// faulty is the daemon with planted defects.
var faulty = defects.Build

var (
	check   = kittest.Check
	waitFor = kittest.WaitFor
	scratch = kittest.Scratch
)

func must[T any](t testing.TB) func(T, error) T { return kittest.Must[T](t) }

package sources

import (
	"os"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

func TestMain(m *testing.M) {
	// No power is cut here.
	os.Exit(kit.Main(func() int { return kit.InMemory(m.Run) }))
}

var (
	check   = kittest.Check
	waitFor = kittest.WaitFor
)

func must[T any](t testing.TB) func(T, error) T { return kittest.Must[T](t) }

package buildkit

import (
	"os"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

func TestMain(m *testing.M) { os.Exit(kit.Main(m.Run)) }

var check = kittest.Check

func must[T any](t testing.TB) func(T, error) T { return kittest.Must[T](t) }

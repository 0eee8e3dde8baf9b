package configs

import (
	"os"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

var registry *kit.Registry

func TestMain(m *testing.M) {
	os.Exit(kit.Main(func() int {
		return kit.InMemory(func() int {
			return kit.WithRegistry(func(r *kit.Registry) int {
				registry = r
				return m.Run()
			})
		})
	}))
}

var check = kittest.Check

func must[T any](t testing.TB) func(T, error) T { return kittest.Must[T](t) }

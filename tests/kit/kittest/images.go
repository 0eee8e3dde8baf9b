package kittest

import (
	"context"
	"os"
	"sync"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Images are kit's standard images in a registry that all tests of a package
// share. None has state that a test could spoil for the next one.
type Images struct {
	registry *kit.Registry
	pushed   sync.Map // name to func() (kit.Pushed, error)
}

// Main runs the tests of a package in [kit.Main], with a registry:
//
//	var images kittest.Images
//
//	func TestMain(m *testing.M) { images.Main(m) }
func (s *Images) Main(m *testing.M) {
	os.Exit(kit.Main(func() int {
		return kit.WithRegistry(func(r *kit.Registry) int {
			s.registry = r
			return m.Run()
		})
	}))
}

// Get returns a standard image, built and pushed at the first call.
func (s *Images) Get(t testing.TB, name string) kit.Pushed {
	t.Helper()
	bins := Binaries(t)
	push := sync.OnceValues(func() (kit.Pushed, error) {
		ctx := context.Background() // the image outlives the test that needs it first
		img, err := kit.Standard(ctx, name, bins)
		if err != nil {
			return kit.Pushed{}, err
		}
		return kit.Push(ctx, s.registry, name, img)
	})
	once, _ := s.pushed.LoadOrStore(name, push)
	return Must[kit.Pushed](t)(once.(func() (kit.Pushed, error))())
}

package tests

import (
	"context"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// parts are made once and shared by all tests: none of them is on a disk under
// test, and none has state that a test could spoil for the next one.
type parts struct {
	bins     kit.Binaries
	registry *kit.Registry
	images   sync.Map // name to func() (kit.Pushed, error)
}

var shared parts

var (
	newDisk  = kittest.NewDisk
	shortDir = kittest.Scratch
)

func TestMain(m *testing.M) { os.Exit(kit.Main(func() int { return withParts(m) })) }

func withParts(m *testing.M) int {
	var err error
	if shared.bins, err = kit.Build(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return kit.WithRegistry(func(r *kit.Registry) int {
		shared.registry = r
		return m.Run()
	})
}

// image returns one of the standard images, built and pushed at the first call.
func image(t testing.TB, name string) kit.Pushed {
	t.Helper()
	ctx := context.Background() // the image outlives the test that asks first
	push := sync.OnceValues(func() (kit.Pushed, error) {
		img, err := standardImage(ctx, name)
		if err != nil {
			return kit.Pushed{}, err
		}
		return kit.Push(ctx, shared.registry, name, img)
	})
	once, _ := shared.images.LoadOrStore(name, push)
	pushed, err := once.(func() (kit.Pushed, error))()
	if err != nil {
		t.Fatal(err)
	}
	return pushed
}

func standardImage(ctx context.Context, name string) (kit.Image, error) {
	switch name {
	case "all-kinds":
		return kit.AllKinds(), nil
	case "empty-layers":
		return kit.EmptyLayers(), nil
	case "runnable":
		return kit.Runnable(ctx)
	case "large":
		return kit.Large(ctx, shared.bins)
	}
	return kit.Image{}, fmt.Errorf("no standard image is called %q", name)
}

// stack is a disk with a daemon and a containerd on it.
type stack struct {
	disk       *kit.Disk
	daemon     *kit.Daemon
	containerd *kit.Containerd
}

// stackOptions change what newStack starts.
type stackOptions struct {
	disk    kit.DiskOptions
	daemon  kit.DaemonOptions
	bins    kit.Binaries // of containerd
	version int          // of containerd's configuration
	extra   string       // further text for it
}

// newStack starts everything on a fresh disk and stops it after the test, in
// order: a daemon that does not stop, or a disk that cannot be unmounted because
// something was left behind, fails the test.
func newStack(t testing.TB, opts stackOptions) *stack {
	t.Helper()
	s := &stack{disk: newDisk(t, opts.disk)}
	opts.daemon.Dir = s.disk.Path("durable")
	s.daemon = startDaemon(t, opts.daemon)

	if opts.bins.Containerd == "" {
		opts.bins = shared.bins
	}
	s.containerd = kittest.StartContainerd(t, kit.ContainerdOptions{
		Binaries: opts.bins, Dir: s.disk.Path("containerd"),
		Daemon: s.daemon, ConfigVersion: opts.version, Extra: opts.extra,
	})
	return s
}

func startDaemon(t testing.TB, opts kit.DaemonOptions) *kit.Daemon {
	t.Helper()
	if opts.Binary == "" {
		opts.Binary = shared.bins.Daemon
	}
	return kittest.StartDaemon(t, opts)
}

// ctr runs ctr and fails the test when it fails. It is given time enough for
// the slowest pull, so that a hang shows up as this call and not as a time-out
// of the whole run.
func (s *stack) ctr(t testing.TB, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	out, err := s.containerd.Ctr(ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

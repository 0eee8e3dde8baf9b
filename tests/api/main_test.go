package api

import (
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

var (
	images  kittest.Images
	newDisk = kittest.NewDisk
	scratch = kittest.Scratch
)

func TestMain(m *testing.M) { images.Main(m) }

// stack is a node without the CRI plugin.
type stack struct{ *kit.Node }

// newStack starts everything on a fresh disk and stops it after the test, in
// order: a daemon that does not stop, or a disk that cannot be unmounted because
// something was left behind, fails the test.
func newStack(t testing.TB, o kit.NodeOptions) *stack {
	t.Helper()
	return &stack{kittest.StartNode(t, o)}
}

// ctr runs ctr and fails the test when it fails.
func (s *stack) ctr(t testing.TB, args ...string) string {
	t.Helper()
	return kittest.Ctr(t, s.Node, args...)
}

// pull pulls an image with ctr, by the transfer service or by the client.
func (s *stack) pull(t testing.TB, way, snapshotter string, img kit.Pushed) {
	t.Helper()
	if way == "local" {
		kittest.Pull(t, s.Node, snapshotter, img.Ref, "--local")
		return
	}
	kittest.Pull(t, s.Node, snapshotter, img.Ref)
}

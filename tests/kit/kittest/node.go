package kittest

import (
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// NewNode makes a node, and closes it after the test. Without other values in o,
// it has a scratch directory, the programs of Binaries, and a disk with ext4.
func NewNode(t testing.TB, o kit.NodeOptions) *kit.Node {
	t.Helper()
	if o.Binaries.Containerd == "" {
		o.Binaries = Binaries(t)
	}
	if o.Dir == "" {
		o.Dir = Scratch(t)
	}
	if o.Disk.FS == "" {
		o.Disk.FS = "ext4"
	}
	n := Must[*kit.Node](t)(kit.NewNode(o))
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// Start starts what the node has, and stops it in the orderly way after the test.
// A containerd that has ended by then fails the test.
func Start(t testing.TB, n *kit.Node) {
	t.Helper()
	if n.Daemon != nil {
		t.Cleanup(func() {
			if n.Daemon.Process != nil {
				Stop(t, n.Daemon.Process)
			}
		})
		Check(t, n.Daemon.Start(t.Context()))
	}
	StartContainerd(t, n)
}

// StartContainerd is Start without the daemon.
func StartContainerd(t testing.TB, n *kit.Node) {
	t.Helper()
	t.Cleanup(func() {
		if n.Containerd == nil || n.Containerd.Process == nil {
			return
		}
		if !n.Containerd.Running() {
			t.Error("containerd has ended before the test")
		}
		Stop(t, n.Containerd.Process)
	})
	Check(t, n.StartContainerd(t.Context()))
}

// StartNode is NewNode and Start.
func StartNode(t testing.TB, o kit.NodeOptions) *kit.Node {
	t.Helper()
	n := NewNode(t, o)
	Start(t, n)
	return n
}

// Ctr runs ctr on the node, and ends the test when it fails.
func Ctr(t testing.TB, n *kit.Node, args ...string) string {
	t.Helper()
	return Must[string](t)(n.Ctr(t.Context(), args...))
}

// Exec runs the guest program in a container that runs, and returns what it prints.
func Exec(t testing.TB, n *kit.Node, container string, args ...string) string {
	t.Helper()
	return Ctr(t, n, append([]string{"task", "exec", "--exec-id", "x", container, "/bin/guest"}, args...)...)
}

// Pull pulls an image by ctr with a snapshotter, with further flags of ctr image
// pull.
func Pull(t testing.TB, n *kit.Node, snapshotter, ref string, flags ...string) {
	t.Helper()
	args := append([]string{"image", "pull", "--plain-http", "--snapshotter", snapshotter}, flags...)
	Ctr(t, n, append(args, ref)...)
}

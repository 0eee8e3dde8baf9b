package buildkit

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// runVar asks for the test.
const runVar = "DURABLE_TEST_BUILDKIT"

// TestPowerCut: with containerd's own differ, and with the daemon's as the first of the diff
// service, which builds and commits also ask for the difference between two snapshots. The
// daemon's has no answer to that, and containerd's is asked then.
func TestPowerCut(t *testing.T) {
	if os.Getenv(runVar) == "" {
		t.Skip("BuildKit takes minutes to compile: make test-matrix runs this")
	}
	t.Run("containerd's differ", func(t *testing.T) { powerCut(t, kit.ContainerdOptions{}) })
	t.Run("the daemon's differ", func(t *testing.T) {
		powerCut(t, kit.ContainerdOptions{Differ: []string{"durable"}, Extra: kit.DifferFirst})
	})
}

// powerCut cuts the power right after a build into the image store, a build into an archive
// that is imported, and a commit of a container. A last pull into the built-in snapshotter
// shows that the cut takes what was not synced.
func powerCut(t *testing.T, containerd kit.ContainerdOptions) {
	n := newNode(t, containerd)
	stored, exported, committed := n.Registry.Ref("stored"), n.Registry.Ref("exported"), n.Registry.Ref("committed")
	n.build(t, "stored", "type=image,name="+stored+",unpack=true")
	if layers, differs := n.extracted(t), len(containerd.Differ) > 0; (layers > 0) != differs {
		t.Errorf("the daemon has extracted %d layers for BuildKit", layers)
	}
	archive := filepath.Join(kittest.Scratch(t), "image.tar")
	n.build(t, "exported", "type=oci,name="+exported+",dest="+archive)
	kittest.Ctr(t, n.Node, "image", "import", "--snapshotter", "durable", archive)

	n.container(t, "--detach", stored, "changed", "/bin/guest", "wait")
	kittest.Exec(t, n.Node, "changed", "write", "/changed", "committed")
	n.commit(t, "changed", committed, "/bin/guest", "cat", "/changed")
	// No container ends from here on: overlayfs syncs the disk when it is unmounted.
	before := map[string]kit.Tree{}
	for _, ref := range []string{stored, exported, committed} {
		before[ref] = must[kit.Tree](t)(n.tree(t, "durable", ref))
	}
	n.ready(t, stored, exported, committed)
	lost := must[kit.Pushed](t)(n.Push(t.Context(), "lost", must[kit.Image](t)(kit.Runnable(t.Context()))))
	kittest.Pull(t, n.Node, "overlayfs", lost.Ref)
	whole := must[kit.Tree](t)(n.tree(t, "overlayfs", lost.Ref))

	check(t, errors.Join(n.PowerCut(), n.Start(t.Context())))
	n.startBuildKit(t)
	if after, err := n.tree(t, "overlayfs", lost.Ref); err == nil && kit.Diff(whole, after, 1) == "" {
		t.Error("the built-in snapshotter has lost nothing: the cut has taken nothing")
	}
	n.ready(t, stored, exported, committed)
	for ref, tree := range before {
		if d := kit.Diff(tree, must[kit.Tree](t)(n.tree(t, "durable", ref)), 5); d != "" {
			t.Errorf("the tree of %s after the power cut:\n%s", ref, d)
		}
		n.runs(t, ref, filepath.Base(ref[:len(ref)-len(":latest")]))
	}
	for file, text := range map[string]string{"/copied": "copied for stored", "/etc/motd": "changed by the build", "/written": "stored"} {
		n.runs(t, committed, text, "/bin/guest", "cat", file)
	}
	// BuildKit's own snapshots, of its cache, are used again.
	again := n.Registry.Ref("again")
	n.build(t, "again", "type=image,name="+again+",unpack=true")
	n.runs(t, again, "again")
	n.ready(t, stored, exported, committed, again)
	log := must[string](t)(n.Daemon.Log())
	if strings.Contains(log, `"event":"layer_damaged"`) { // it would heal from its blob, if there is one
		t.Error("the power cut has damaged a layer")
	}
	kittest.NoPanic(t, log)
}

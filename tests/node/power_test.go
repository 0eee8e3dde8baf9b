package node

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// everyNode runs a test for both policies on both snapshotters.
func everyNode(t *testing.T, test func(*testing.T, options)) {
	for _, policy := range []string{never, ifNotPresent} {
		for _, snapshotter := range []string{overlayfs, durable} {
			t.Run(policy+"/"+snapshotter, func(t *testing.T) { test(t, options{snapshotter: snapshotter, policy: policy}) })
		}
	}
}

// writeback is how long the kernel leaves what was written in memory, at the
// least (vm.dirty_expire_centisecs): what it has written by itself no power cut
// takes. A control that has taken longer shows nothing.
const writeback = 25 * time.Second

// TestPowerCut cuts the power when all pods run.
func TestPowerCut(t *testing.T) {
	everyNode(t, func(t *testing.T, o options) {
		for attempt := 1; ; attempt++ {
			back, exposed := cutOnce(t, o)
			switch {
			case back == (o.snapshotter == durable):
				return
			case o.snapshotter == durable:
				t.Fatal("pods stay away")
			case exposed < writeback || attempt == 3:
				t.Fatalf("pods came back on overlayfs, %v after the first pull: the power cut took nothing", exposed)
			}
			t.Logf("the kernel had %v to write the layers by itself: once more", exposed)
		}
	})
}

// cutOnce reports whether all pods come back, and how long after the beginning of
// the first pull the power was cut.
func cutOnce(t *testing.T, o options) (back bool, exposed time.Duration) {
	t.Helper()
	begin := time.Now()
	n := newNode(t, o)
	check(t, n.kubelet.Start(t.Context()))
	n.run(t)
	var before map[string]kit.Tree
	if n.Daemon != nil {
		before = n.trees(t)
	}
	exposed = time.Since(begin)
	check(t, n.PowerCut())

	torn, records := n.torn(t)
	lost := 2
	for _, file := range n.programs(t) {
		if must[os.FileInfo](t)(os.Stat(file)).Size() > 0 {
			lost--
		}
	}
	t.Logf("power cut %.1f s after the first pull; of 2 layers with the program %d have lost it; of %d records of pulls %d are empty",
		exposed.Seconds(), lost, records, len(torn))
	if o.policy == never && records > 0 {
		t.Errorf("the kubelet has %d records of images that it has not pulled", records)
	}
	n.forgetTorn(t)
	back = n.afterwards(t, before)
	n.off(t)
	return back, exposed
}

// programs are the files of the program of all containers: in a layer of pause, and
// in one that the pods' images have in common.
func (n *node) programs(t *testing.T) []string {
	t.Helper()
	return must[[]string](t)(filepath.Glob(filepath.Join(n.snapshots(), "*", "fs", "bin", "guest")))
}

// afterwards starts a node that was down, without a registry, and reports whether
// all pods come back. Those of durable must do so without a request to the registry, and
// their layers must be what they were.
func (n *node) afterwards(t *testing.T, before map[string]kit.Tree) (back bool) {
	t.Helper()
	n.Registry.Silence()
	requests := n.Registry.Requests()
	begin := time.Now()
	n.start(t)
	text, back := n.settle(t)
	requests = n.Registry.Requests() - requests
	t.Logf("%s, settled %.1f s after the start, %d requests to the registry:\n%s", n.snapshotter, time.Since(begin).Seconds(), requests, text)
	if n.Daemon == nil {
		return back
	}
	if requests != 0 {
		t.Errorf("%d requests to the registry, want none", requests)
	}
	n.whole(t, before)
	return back
}

// forgetTorn is the cure that docs/design.md has for empty records: TestTornRecord
// shows what they do.
func (n *node) forgetTorn(t *testing.T) {
	t.Helper()
	torn, _ := n.torn(t)
	for _, file := range torn {
		check(t, os.Remove(file))
	}
}

// TestDamage empties the program of all images while the machine is down after an
// unclean shutdown that has cost nothing else. The blob of its layer is good.
func TestDamage(t *testing.T) {
	everyNode(t, func(t *testing.T, o options) {
		n := newNode(t, o)
		check(t, n.kubelet.Start(t.Context()))
		n.run(t)
		var before map[string]kit.Tree
		if n.Daemon != nil {
			before = n.trees(t)
		}
		check(t, n.Reboot())
		programs := n.programs(t)
		if len(programs) != 2 {
			t.Fatalf("the program is in the layers %q, want two", programs)
		}
		for _, file := range programs {
			check(t, os.Truncate(file, 0))
		}
		if back := n.afterwards(t, before); back != (n.snapshotter == durable) {
			t.Errorf("all pods come back: %v", back)
		}
	})
}

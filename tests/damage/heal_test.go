package damage

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestHealed does the damages of the catalogue one by one to each layer of an
// image in use, and lets repair heal it. The layer is then what a fresh
// unpacking of it is, and the container has noticed nothing.
func TestHealed(t *testing.T) {
	t.Parallel()
	n := newNodeInUse(t, "ext4")
	mark := n.container.mark(t)
	for layer, d := range someDamages() {
		if d.deep {
			continue // see TestHealedDeep
		}
		t.Run(d.dir(layer), func(t *testing.T) {
			check(t, d.inflict(n.root(layer), d.dir(layer)))
			want := map[string][]kit.Finding{layer: d.expected(d.dir(layer))}
			n.plans(t, want)
			n.heals(t, want)
			n.clean(t)
			n.whole(t)
		})
	}
	n.startsAnew(t)
	n.clean(t, "--deep")
	n.container.undisturbed(t, mark)
}

// TestHealedDeep is TestHealed for damages of the content, which are found by
// digests or by the blob.
func TestHealedDeep(t *testing.T) {
	t.Parallel()
	n := newNodeInUse(t, "ext4")
	mark := n.container.mark(t)
	heal := func(t *testing.T) {
		want := map[string][]kit.Finding{}
		for layer, d := range damages() {
			if d.deep {
				check(t, d.inflict(n.root(layer), d.dir(layer)))
				want[layer] = append(want[layer], d.expected(d.dir(layer))...)
			}
		}
		if results := n.repair(t, 0, "--apply"); len(results) > 0 {
			t.Errorf("without --deep, repair has found %+v", results)
		}
		n.plans(t, want, "--deep")
		n.heals(t, want, "--deep")
		n.clean(t, "--deep")
		n.whole(t)
		n.startsAnew(t)
	}
	n.digested(t)
	t.Run("by digests", heal)
	n.digested(t)
	t.Run("by blobs", func(t *testing.T) { n.withoutDigests(t, func() { heal(t) }) })
	n.container.undisturbed(t, mark)
}

// TestHealedTogether does all damages at once to all layers, on each file
// system with the daemon running, on ext4 with it stopped, too. There whole layers go
// then, and come back at the first call that needs them.
func TestHealedTogether(t *testing.T) {
	t.Parallel()
	for _, fs := range fileSystems {
		t.Run(fs, func(t *testing.T) {
			n := newNodeInUse(t, fs)
			mark := n.container.mark(t)
			all := func() {
				want := n.inflictAll(t)
				n.plans(t, want)
				n.heals(t, want)
				n.clean(t, "--deep")
				n.whole(t)
			}
			all()
			if fs == "ext4" || kittest.Every() {
				n.startsAnew(t)
				check(t, n.Daemon.Stop())
				all()
				check(t, n.Daemon.Start(t.Context()))
				n.reached(t)
			}
			n.startsAnew(t)
			n.container.undisturbed(t, mark)
			n.container.restart(t)
			if fs == "ext4" || kittest.Every() {
				n.regainsLayers(t)
			}
		})
	}
}

// regainsLayers removes the directories of layers, from below a container.
func (n *node) regainsLayers(t *testing.T) {
	t.Helper()
	mark := n.container.mark(t)
	whole := func(t *testing.T) {
		t.Helper()
		n.clean(t)
		n.clean(t, "--cached")
		n.whole(t)
		n.startsAnew(t)
	}
	for i, layer := range layerNames {
		t.Run(layer+" verified", func(t *testing.T) {
			check(t, os.RemoveAll(n.root(layer)))
			n.readyToContainerd(t, i)
			whole(t)
		})
		t.Run(layer+" started from", func(t *testing.T) {
			n.remove(t, n.dir(layer))
			n.startsAnew(t)
			whole(t)
		})
	}
	t.Run("snapshots", func(t *testing.T) {
		n.remove(t, n.Daemon.Root+"/snapshots")
		n.readyToContainerd(t, len(layerNames)-1)
		n.startsAnew(t)
		whole(t)
	})
	n.container.alive(t, mark)
}

// reached waits until containerd has reached a daemon that was down: calls fail
// with the error of its last attempt until it makes the next one.
func (n *node) reached(t *testing.T) {
	t.Helper()
	waitFor(t, 30*time.Second, func() error {
		_, err := n.Ctr(t.Context(), "snapshot", "--snapshotter", "durable", "info", n.image.Top())
		return err
	})
}

// readyToContainerd calls Stat of containerd for a layer of the image, which calls the daemon.
func (n *node) readyToContainerd(t *testing.T, i int) {
	t.Helper()
	info := n.ctr(t, "snapshot", "--snapshotter", "durable", "info", n.image.ChainIDs[i].String())
	if !strings.Contains(info, `"durable-snapshotter/state": "ready"`) {
		t.Errorf("containerd reports of layer %s: %s", layerNames[i], info)
	}
}

// TestHealedSeal damages what layers are compared with. It comes back with the
// layer.
func TestHealedSeal(t *testing.T) {
	t.Parallel()
	n := newNodeInUse(t, "ext4")
	mark := n.container.mark(t)
	for name, damage := range sealDamages(n) {
		t.Run(name, func(t *testing.T) {
			check(t, damage(n.dir("middle")+"/seal"))
			if results := n.repair(t, 0, "--apply"); !slices.ContainsFunc(results, func(r kit.Verdict) bool { return r.ID == n.ids["middle"] && r.Healed }) {
				t.Errorf("repair has not healed layer middle, but %+v", results)
			}
			n.clean(t)
			n.whole(t)
		})
	}
	n.startsAnew(t)
	n.container.undisturbed(t, mark)
}

// plans fails unless repair plans to extract exactly the given layers from
// their blobs, and changes nothing.
func (n *node) plans(t *testing.T, want map[string][]kit.Finding, args ...string) {
	t.Helper()
	before := map[string]kit.Tree{}
	for layer := range want {
		before[layer] = must[kit.Tree](t)(kit.Fingerprint(n.root(layer)))
	}
	for layer, r := range n.repairs(t, 1, want, args...) {
		if blob := n.image.Layers[slices.Index(layerNames, layer)].Digest.String(); r.Blob != blob || r.Plan != "extract again from "+blob || r.Healed || r.State != "damaged" {
			t.Errorf("the plan for layer %s is %+v, want to extract it from %s", layer, r, blob)
		}
	}
	for layer := range want {
		if diff := kit.Diff(before[layer], must[kit.Tree](t)(kit.Fingerprint(n.root(layer))), 5); diff != "" {
			t.Errorf("a plan has changed layer %s:\n%s", layer, diff)
		}
	}
}

// heals fails unless repair heals exactly the given layers.
func (n *node) heals(t *testing.T, want map[string][]kit.Finding, args ...string) {
	t.Helper()
	for layer, r := range n.repairs(t, 0, want, append([]string{"--apply"}, args...)...) {
		if !r.Healed || r.State != "ready" || r.Reason != "" {
			t.Errorf("layer %s was not healed: %+v", layer, r)
		}
	}
	for _, e := range kittest.Inspect(t, n.Daemon).Journal.Committed {
		for layer := range want {
			if e.ID == n.ids[layer] && e.Strategy != "healed" {
				t.Errorf("the journal records that layer %s was made with %q", layer, e.Strategy)
			}
		}
	}
	if left, err := os.ReadDir(n.Daemon.Root + "/healing"); err != nil || len(left) > 0 {
		t.Errorf("healing has left %v, %v", left, err)
	}
}

// repairs returns what repair reports of each layer, which must have the given
// findings and no other layer any.
func (n *node) repairs(t *testing.T, status int, want map[string][]kit.Finding, args ...string) map[string]kit.Verdict {
	t.Helper()
	byLayer := map[string]kit.Verdict{}
	for _, r := range n.repair(t, status, args...) {
		layer := n.layerOf(t, r.ID)
		byLayer[layer] = r
		sameFindings(t, layer, want[layer], r.Findings)
	}
	for layer := range want {
		if _, ok := byLayer[layer]; !ok {
			t.Errorf("repair %q reports nothing of layer %s, which is damaged", args, layer)
		}
	}
	return byLayer
}

func (n *node) layerOf(t *testing.T, id uint64) string {
	t.Helper()
	for layer, own := range n.ids {
		if own == id {
			return layer
		}
	}
	t.Fatalf("%s is no layer of the image", strconv.FormatUint(id, 10))
	return ""
}

package damage

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestDetected does the damages of the catalogue one by one to each layer of an
// image in use. check names the layer, the path and the difference, and nothing
// else; of a deep damage it sees nothing without --deep, and with it the same,
// whether it compares with digests or with the blob.
func TestDetected(t *testing.T) {
	t.Parallel()
	n := newNodeInUse(t, "ext4")
	n.digested(t)
	mark := n.container.mark(t)
	for layer, d := range someDamages() {
		t.Run(d.dir(layer), func(t *testing.T) {
			check(t, d.inflict(n.root(layer), d.dir(layer)))
			before := must[kit.Tree](t)(kit.Fingerprint(n.root(layer)))
			found := map[string][]kit.Finding{layer: d.expected(d.dir(layer))}
			if d.deep {
				n.clean(t)
				n.finds(t, found, "--deep")
				n.withoutDigests(t, func() { n.finds(t, found, "--deep") })
			} else {
				n.finds(t, found)
			}
			if diff := kit.Diff(before, must[kit.Tree](t)(kit.Fingerprint(n.root(layer))), 5); diff != "" {
				t.Errorf("check has written:\n%s", diff)
			}
			n.putBack(t, layer, d)
		})
	}
	n.clean(t)
	n.clean(t, "--deep")
	n.withoutDigests(t, func() { n.clean(t, "--deep") })
	n.whole(t)
	n.container.undisturbed(t, mark)
}

// withoutDigests takes the content digests away while do runs, so that content
// is compared with blobs. The journal knows of them still, and so the daemon
// makes no new ones.
func (n *node) withoutDigests(t *testing.T, do func()) {
	t.Helper()
	for _, layer := range layerNames {
		file := filepath.Join(n.dir(layer), "contents")
		check(t, os.Rename(file, file+".away"))
		defer func() {
			// A layer that is healed meanwhile has none.
			if err := os.Rename(file+".away", file); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
		}()
	}
	do()
}

// TestDetectedTogether does all damages at once to all layers, on each file
// system, with the daemon running and stopped. Then whole layers go.
func TestDetectedTogether(t *testing.T) {
	t.Parallel()
	for _, fs := range fileSystems {
		t.Run(fs, func(t *testing.T) {
			n := newNodeInUse(t, fs)
			mark := n.container.mark(t)
			want := n.inflictAll(t)
			n.finds(t, want)
			check(t, n.Daemon.Stop())
			n.finds(t, want)
			n.container.undisturbed(t, mark)
			for layer, d := range damages() {
				n.putBack(t, layer, d)
			}
			n.clean(t)
			n.whole(t)
			n.losesLayers(t)
			check(t, n.Daemon.Start(t.Context()))
			n.container.alive(t, mark)
			n.startsAnew(t)
		})
	}
}

// inflictAll does every damage to every layer, and returns what check must find
// without --deep.
func (n *node) inflictAll(t *testing.T) map[string][]kit.Finding {
	t.Helper()
	want := map[string][]kit.Finding{}
	for layer, d := range damages() {
		check(t, d.inflict(n.root(layer), d.dir(layer)))
		if !d.deep {
			want[layer] = append(want[layer], d.expected(d.dir(layer))...)
		}
	}
	return want
}

// gone is what is found of a layer that is not there.
var gone = []kit.Finding{{Path: ".", What: "missing"}}

// losesLayers removes the directories of layers, from below a container, while
// there is no daemon that would heal them.
func (n *node) losesLayers(t *testing.T) {
	t.Helper()
	for _, layer := range layerNames {
		t.Run(layer, func(t *testing.T) {
			mark := n.container.mark(t)
			check(t, os.RemoveAll(n.root(layer)))
			n.finds(t, map[string][]kit.Finding{layer: gone})
			n.remove(t, n.dir(layer))
			n.finds(t, map[string][]kit.Finding{layer: gone})
			n.container.alive(t, mark)
			n.putBackLayer(t, layer)
			n.clean(t)
		})
	}
	t.Run("snapshots", func(t *testing.T) {
		mark := n.container.mark(t)
		n.remove(t, n.Daemon.Root+"/snapshots")
		all := map[string][]kit.Finding{}
		for _, layer := range layerNames {
			all[layer] = gone
		}
		n.finds(t, all)
		n.container.alive(t, mark)
		for _, layer := range layerNames {
			n.putBackLayer(t, layer)
		}
		n.clean(t)
	})
}

// TestDetectedSeal damages what check compares with. A layer without a valid
// seal is damaged, whatever its tree is like, and no difference of the tree is
// made up.
func TestDetectedSeal(t *testing.T) {
	t.Parallel()
	n := newNodeInUse(t, "ext4")
	for name, damage := range sealDamages(n) {
		t.Run(name, func(t *testing.T) {
			check(t, damage(n.dir("middle")+"/seal"))
			result := n.check(t, 1, n.image.ChainIDs[1].String())[0]
			if result.State != "damaged" || len(result.Findings) > 0 || !strings.Contains(result.Reason, "no valid seal") {
				t.Errorf("%+v, want it to be damaged for the lack of a valid seal", result)
			}
			n.putBackLayer(t, "middle")
			n.putBackLayer(t, "top")
			n.clean(t)
		})
	}
}

// sealDamages are ways to lose what a layer is compared with.
func sealDamages(n *node) map[string]func(file string) error {
	return map[string]func(file string) error{
		"removed":          os.Remove,
		"emptied":          func(file string) error { return os.Truncate(file, 0) },
		"cut":              func(file string) error { return os.Truncate(file, 100) },
		"of another layer": func(file string) error { return os.Rename(filepath.Join(n.dir("top"), filepath.Base(file)), file) },
	}
}

// someDamages is damages, of which make test takes every second: all of them happen in
// tests in which many happen together.
func someDamages() func(yield func(layer string, d *damage) bool) {
	return func(yield func(string, *damage) bool) {
		i := 0
		for layer, d := range damages() {
			if i++; kittest.Turn(i-1, 2) && !yield(layer, d) {
				return
			}
		}
	}
}

// damages goes through the catalogue for each layer.
func damages() func(yield func(layer string, d *damage) bool) {
	return func(yield func(string, *damage) bool) {
		for _, layer := range everyLayer {
			for i := range catalogue {
				if d := &catalogue[i]; slices.Contains(d.layers, layer) && !yield(layer, d) {
					return
				}
			}
		}
	}
}

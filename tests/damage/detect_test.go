package damage

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestDetected does the damages of the catalogue one by one to each layer of an
// image in use. check names the layer, the path and the difference, and nothing
// else; of a deep damage it sees nothing at the depth of metadata.
func TestDetected(t *testing.T) {
	n := newNode(t, "ext4")
	mark := n.container.mark(t)
	for _, layer := range everyLayer {
		for _, d := range catalogue {
			if !slices.Contains(d.layers, layer) {
				continue
			}
			t.Run(d.dir(layer), func(t *testing.T) {
				check(t, d.inflict(n.root(layer), d.dir(layer)))
				before := must[kit.Tree](t)(kit.Fingerprint(n.root(layer)))
				n.finds(t, found(layer, d.expected(d.dir(layer))))
				if diff := kit.Diff(before, must[kit.Tree](t)(kit.Fingerprint(n.root(layer))), 5); diff != "" {
					t.Errorf("check has written:\n%s", diff)
				}
				n.putBack(t, layer, &d)
			})
		}
	}
	n.clean(t)
	n.whole(t)
	n.container.undisturbed(t, mark)
}

// found is the findings of one layer; of none when there are none.
func found(layer string, f []finding) map[string][]finding {
	if len(f) == 0 {
		return nil
	}
	return map[string][]finding{layer: f}
}

// TestDetectedTogether does all damages at once to all layers, on each file
// system, with the daemon running and stopped. Then whole layers go.
func TestDetectedTogether(t *testing.T) {
	for _, fs := range fileSystems {
		t.Run(fs, func(t *testing.T) {
			n := newNode(t, fs)
			mark := n.container.mark(t)
			want := n.inflictAll(t)
			n.finds(t, want)
			check(t, n.daemon.Stop())
			n.finds(t, want)
			n.container.undisturbed(t, mark)
			for _, layer := range everyLayer {
				for _, d := range catalogue {
					if slices.Contains(d.layers, layer) {
						n.putBack(t, layer, &d)
					}
				}
			}
			n.clean(t)
			n.whole(t)
			check(t, n.daemon.Start(t.Context()))
			n.container.undisturbed(t, mark)
			n.losesLayers(t)
		})
	}
}

// inflictAll does every damage to every layer, and returns what check must find.
func (n *node) inflictAll(t *testing.T) map[string][]finding {
	t.Helper()
	want := map[string][]finding{}
	for _, layer := range everyLayer {
		for _, d := range catalogue {
			if slices.Contains(d.layers, layer) {
				check(t, d.inflict(n.root(layer), d.dir(layer)))
				want[layer] = append(want[layer], d.expected(d.dir(layer))...)
			}
		}
	}
	return want
}

// losesLayers removes the directories of layers, from below a container.
func (n *node) losesLayers(t *testing.T) {
	t.Helper()
	gone := []finding{{Path: ".", What: "missing"}}
	for _, layer := range layerNames {
		t.Run(layer, func(t *testing.T) {
			mark := n.container.mark(t)
			check(t, os.RemoveAll(n.root(layer)))
			n.finds(t, found(layer, gone))
			check(t, os.RemoveAll(n.dir(layer)))
			n.finds(t, found(layer, gone))
			n.container.alive(t, mark)
			n.putBackLayer(t, layer)
			n.clean(t)
		})
	}
	t.Run("snapshots", func(t *testing.T) {
		mark := n.container.mark(t)
		check(t, os.RemoveAll(n.daemon.Root+"/snapshots"))
		all := map[string][]finding{}
		for _, layer := range layerNames {
			all[layer] = gone
		}
		n.finds(t, all)
		n.container.alive(t, mark)
		for _, layer := range layerNames {
			n.putBackLayer(t, layer)
		}
		n.clean(t)
		n.startsAnew(t)
	})
}

// TestDetectedSeal damages what check compares with. A layer without a valid
// seal is not ready, and no difference of its tree is made up.
func TestDetectedSeal(t *testing.T) {
	n := newNode(t, "ext4")
	for _, c := range []struct {
		name   string
		damage func(seal string) error
	}{
		{"removed", os.Remove},
		{"emptied", func(seal string) error { return os.Truncate(seal, 0) }},
		{"cut", func(seal string) error { return os.Truncate(seal, 100) }},
		{"of another layer", func(seal string) error { return os.Rename(n.dir("top")+"/seal", seal) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			check(t, c.damage(n.dir("middle")+"/seal"))
			result := n.check(t, 1, n.image.ChainIDs[1].String())[0]
			if result.State == "ready" || len(result.Findings) > 0 || !strings.Contains(result.Reason, "no valid seal") {
				t.Errorf("%+v, want it not to be ready for the lack of a valid seal", result)
			}
			n.putBackLayer(t, "middle")
			n.putBackLayer(t, "top")
			n.clean(t)
		})
	}
}

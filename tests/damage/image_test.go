package damage

import (
	"context"
	"slices"
	"sync"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// layerNames are those of the image's layers, lowest first. The last has no
// entry at all, as a Dockerfile's ENV line makes one.
var layerNames = []string{"base", "middle", "top", "empty"}

// image is built and pushed at the first use.
var image = sync.OnceValues(func() (kit.Pushed, error) {
	img, err := buildImage()
	if err != nil {
		return kit.Pushed{}, err
	}
	return kit.Push(context.Background(), registry, "victims", img)
})

func buildImage() (kit.Image, error) {
	program, err := kit.Witness(context.Background())
	if err != nil {
		return kit.Image{}, err
	}
	witness, err := kit.FileFrom("bin/witness", 0o755, program)
	if err != nil {
		return kit.Image{}, err
	}
	base := []kit.Entry{
		kit.Dir("proc", 0o555), kit.Dir("sys", 0o555), kit.Dir("dev", 0o755), kit.Dir("bin", 0o755), witness,
	}
	base = append(base, entries("base")...)
	for _, layer := range overOthers {
		base = append(base, entriesBelow(layer)...)
	}
	return kit.Image{Layers: []kit.Layer{
		kit.NewLayer(kit.Gzip, base...),
		kit.NewLayer(kit.Zstd, entries("middle")...),
		kit.NewLayer(kit.Plain, entries("top")...),
		kit.NewLayer(kit.Gzip),
	}}, nil
}

// entries are what a layer has: something to watch, and victims.
func entries(layer string) []kit.Entry {
	all := []kit.Entry{
		kit.Dir(layer, 0o755),
		kit.File(layer+"/held", 0o644, "held by "+layer),
		kit.Dir(layer+"/watched", 0o755),
		kit.File(layer+"/watched/a", 0o644, ""),
		kit.File(layer+"/watched/b", 0o644, ""),
	}
	for _, d := range catalogue {
		if slices.Contains(d.layers, layer) {
			all = append(all, kit.Dir(d.dir(layer), 0o755))
			if d.has != nil {
				all = append(all, d.has(d.dir(layer))...)
			}
		}
	}
	return all
}

// entriesBelow are what the damages of a layer need in a lower one.
func entriesBelow(layer string) []kit.Entry {
	all := []kit.Entry{kit.Dir(layer, 0o755)}
	for _, d := range catalogue {
		if slices.Contains(d.layers, layer) && d.below != nil {
			all = append(all, kit.Dir(d.dir(layer), 0o755))
			all = append(all, d.below(d.dir(layer))...)
		}
	}
	return all
}

// dir is where a layer has the victims of the damage.
func (d *damage) dir(layer string) string { return layer + "/" + d.name }

// watched are the paths that the container reads, with what it must see.
var watched = func() map[string]string {
	paths := map[string]string{}
	for _, layer := range everyLayer {
		paths["/"+layer+"/held"] = "held by " + layer
		paths["/"+layer+"/watched"] = "a b"
	}
	return paths
}()

// TestCatalogue: a damage lists what is found of it, which is about content when
// it is deep, and about metadata when it is not.
func TestCatalogue(t *testing.T) {
	names := map[string]bool{}
	for _, d := range catalogue {
		if names[d.name] {
			t.Errorf("%s is in the catalogue twice", d.name)
		}
		names[d.name] = true
		if len(d.finds) == 0 {
			t.Errorf("%s: nothing is found", d.name)
		}
		for _, f := range d.finds {
			if d.deep != (f.What == "sha256digest") {
				t.Errorf("%s: deep is %t, and what is found is %+v", d.name, d.deep, f)
			}
		}
	}
}

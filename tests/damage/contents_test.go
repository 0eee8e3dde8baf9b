package damage

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestDigestsWithoutBlobs: of a node whose blobs are gone, content is compared
// with the digests that were taken soon after the Commit.
func TestDigestsWithoutBlobs(t *testing.T) {
	t.Parallel()
	n := newNodeInUse(t, "ext4")
	mark := n.container.mark(t)
	n.digested(t)
	n.losesBlobs(t)
	for _, layer := range layerNames {
		check(t, os.Remove(n.blob(layer)))
	}
	n.clean(t, "--deep")
	for layer, d := range damages() {
		if !d.deep {
			continue
		}
		t.Run(d.dir(layer), func(t *testing.T) {
			check(t, d.inflict(n.root(layer), d.dir(layer)))
			want := map[string][]finding{layer: d.expected(d.dir(layer))}
			n.clean(t)
			n.finds(t, want, "--deep")
			for _, r := range n.repairs(t, 1, want, "--apply", "--deep") {
				if r.Healed || r.State != "damaged" {
					t.Errorf("healed from no blob: %+v", r)
				}
			}
			n.refused(t, layer)
			// Somebody brings it back by hand. repair looks and believes it.
			n.putBack(t, layer, d)
			if results := n.repair(t, 0, "--apply", "--deep"); len(results) > 0 {
				t.Errorf("repair says of layers that are whole again: %+v", results)
			}
			n.startsAnew(t)
			n.clean(t, "--cached")
		})
	}
	n.losesDigests(t)
	n.container.undisturbed(t, mark)
}

// losesBlobs: content that can only be compared with a bad blob is not said to be
// whole, and not said to be damaged.
func (n *node) losesBlobs(t *testing.T) {
	t.Helper()
	for i, layer := range everyLayer {
		good := must[[]byte](t)(os.ReadFile(n.blob(layer)))
		for _, bad := range badBlobs {
			t.Run(layer+" with its blob "+bad.name, func(t *testing.T) {
				check(t, bad.do(n.blob(layer)))
				n.clean(t, "--deep")
				n.withoutDigests(t, func() { n.contentUnknown(t, i) })
				check(t, os.WriteFile(n.blob(layer), good, 0o444))
			})
		}
	}
}

// contentUnknown fails unless check says of the content of layer i that it is
// not known.
func (n *node) contentUnknown(t *testing.T, i int) {
	t.Helper()
	r := n.check(t, 1, "--deep", n.image.ChainIDs[i].String())[0]
	if r.State != "unverified" || len(r.Findings) > 0 || !strings.Contains(r.Reason, "compared with nothing") {
		t.Errorf("without digests and blob, check --deep says of layer %s: %+v", layerNames[i], r)
	}
}

// losesDigests is losesBlobs the other way round.
func (n *node) losesDigests(t *testing.T) {
	t.Helper()
	for name, damage := range sealDamages(n) {
		t.Run("digests "+name, func(t *testing.T) {
			aside := t.TempDir()
			for _, layer := range []string{"middle", "top"} {
				copyTree(t, n.dir(layer)+"/contents", aside+"/"+layer)
			}
			check(t, damage(n.dir("middle")+"/contents"))
			n.contentUnknown(t, 1)
			n.clean(t)
			n.startsAnew(t)
			for _, layer := range []string{"middle", "top"} {
				copyTree(t, aside+"/"+layer, n.dir(layer)+"/contents")
			}
			n.clean(t, "--deep")
		})
	}
}

// TestDigestsOfThisBootOnly: a digest that is taken after a power cut would make
// whatever the cut has left the truth.
func TestDigestsOfThisBootOnly(t *testing.T) {
	d := startDaemon(t, newDisk(t, "ext4"), kit.DaemonOptions{})
	old := must[string](t)(makeLayer(t.Context(), connect(t, d), "", 1, 1))
	check(t, d.Kill())
	digested := func(name string) bool {
		results := runCheck(t, d, 1, "--cached")
		return slices.ContainsFunc(results, func(r result) bool { return r.Name == name && r.Contents != "" })
	}
	check(t, kit.NewBoot())
	if digested(old) {
		t.Fatal("the digest was taken before the power cut: this machine is too slow for this test")
	}
	check(t, d.Start(t.Context()))
	t.Parallel() // from here on the boot stays
	// A new layer gets its digest after all older ones that get any.
	fresh := must[string](t)(makeLayer(t.Context(), connect(t, d), "", 1, 2))
	_, err := connect(t, d).Stat(t.Context(), old)
	check(t, err)
	waitFor(t, waitForDigests, func() error {
		for _, r := range runCheck(t, d, 0, "--cached") {
			switch {
			case r.Name == old && r.Contents != "":
				t.Fatalf("the layer of an earlier boot was digested: %+v", r)
			case r.Name == fresh && r.Contents != "":
				return nil
			}
		}
		return errors.New("the new layer has no content digest yet")
	})
	if r := runCheck(t, d, 1, "--deep", old)[0]; r.State != "unverified" {
		t.Errorf("check --deep says of a layer without digests and blob: %+v", r)
	}
}

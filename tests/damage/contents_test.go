package damage

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
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
	i := -1
	for layer, d := range damages() {
		if !d.deep {
			continue
		}
		if i++; !kittest.Turn(i, 2) {
			continue
		}
		t.Run(d.dir(layer), func(t *testing.T) {
			check(t, d.inflict(n.root(layer), d.dir(layer)))
			want := map[string][]kit.Finding{layer: d.expected(d.dir(layer))}
			n.clean(t)
			n.finds(t, want, "--deep")
			for _, r := range n.repairs(t, 1, want, "--apply", "--deep") {
				if r.Healed || r.State != "damaged" {
					t.Errorf("healed from no blob: %+v", r)
				}
			}
			n.refused(t, layer)
			// An operator brings it back by hand. repair verifies it and reports it ready.
			n.putBack(t, layer, d)
			if results := n.repair(t, 0, "--apply", "--deep"); len(results) > 0 {
				t.Errorf("repair reports of layers that are whole again: %+v", results)
			}
			n.startsAnew(t)
			n.clean(t, "--cached")
		})
	}
	n.losesDigests(t)
	n.container.undisturbed(t, mark)
}

// losesBlobs: content that can only be compared with a bad blob is neither reported as
// whole nor as damaged.
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

// contentUnknown fails unless check reports of the content of layer i that it is
// not known.
func (n *node) contentUnknown(t *testing.T, i int) {
	t.Helper()
	r := n.check(t, 0, "--deep", n.image.ChainIDs[i].String())[0]
	if r.State != "not comparable" || len(r.Findings) > 0 || !strings.Contains(r.Reason, "nothing to compare the content with") {
		t.Errorf("without digests and blob, check --deep reports of layer %s: %+v", layerNames[i], r)
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
// whatever the cut has left the reference.
func TestDigestsOfThisBootOnly(t *testing.T) {
	d := startDaemon(t, newDisk(t, "ext4"), kit.DaemonOptions{})
	old := ""
	for n := uint64(1); old == ""; n += 3 { // every third is written through a mount
		if n > 30 {
			t.Fatal("content digests were taken before each of 10 power cuts")
		}
		name := must[string](t)(makeLayer(t.Context(), connect(t, d), "", 1, n))
		check(t, d.Kill())
		check(t, kit.NewBoot())
		results := runCheck(t, d, 3, "--cached")
		if !slices.ContainsFunc(results, func(r kit.Verdict) bool { return r.Name == name && r.Contents != "" }) {
			old = name
		}
		check(t, d.Start(t.Context()))
		_, err := connect(t, d).Stat(t.Context(), name)
		check(t, err)
	}
	t.Parallel() // from here on the boot stays
	// A new layer gets its digest after all older ones that get any.
	fresh := must[string](t)(makeLayer(t.Context(), connect(t, d), "", 1, 2))
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
	if r := runCheck(t, d, 0, "--deep", old)[0]; r.State != "not comparable" {
		t.Errorf("check --deep reports of a layer without digests and blob: %+v", r)
	}
}

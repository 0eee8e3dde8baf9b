package damage

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// badBlobs are ways to lose what a layer is healed from. The layers of the image
// are compressed in different ways, which notice different things: what is not
// compressed notices nothing.
var badBlobs = []struct {
	name   string
	do     func(file string) error
	reason string // part of the reason why a layer was not healed
}{
	{"missing", os.Remove, "missing"},
	{"emptied", func(file string) error { return os.Truncate(file, 0) }, " has 0 bytes, "},
	{"half", func(file string) error { return cut(file, func(n int64) int64 { return n / 2 }) }, " expected"},
	{"without its last byte", func(file string) error { return cut(file, func(n int64) int64 { return n - 1 }) }, " expected"},
	{"flipped in the middle", func(file string) error { return flip(file, func(n int64) int64 { return n / 2 }) }, "blob "},
	{"flipped at the end", func(file string) error { return flip(file, func(n int64) int64 { return n - 1 }) }, "blob "},
}

func cut(file string, to func(size int64) int64) error {
	info, err := os.Stat(file)
	if err != nil {
		return err
	}
	return os.Truncate(file, to(info.Size()))
}

func flip(file string, at func(size int64) int64) error {
	content, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	// Two bytes and all their bits: some bits of deflate mean nothing.
	i := at(int64(len(content)))
	for j := i; j < min(i+2, int64(len(content))); j++ {
		content[j] ^= 0xff
	}
	return os.WriteFile(file, content, 0o444)
}

// TestNoGoodBlob damages layers whose blob is bad, too. They stay damaged, and
// every caller gets an error with the reason, live and after an unclean shutdown, until the
// blob is there again.
func TestNoGoodBlob(t *testing.T) {
	t.Parallel()
	n := newNodeInUse(t, "ext4")
	mark := n.container.mark(t)
	for _, layer := range everyLayer {
		good := must[[]byte](t)(os.ReadFile(n.blob(layer)))
		for _, bad := range badBlobs {
			t.Run(layer+" "+bad.name, func(t *testing.T) {
				d := fileEmptied()
				check(t, d.inflict(n.root(layer), d.dir(layer)))
				check(t, bad.do(n.blob(layer)))
				n.staysDamaged(t, layer, d.expected(d.dir(layer)), bad.reason)

				check(t, os.WriteFile(n.blob(layer), good, 0o444))
				n.heals(t, map[string][]kit.Finding{layer: d.expected(d.dir(layer))})
				n.clean(t)
				n.whole(t)
			})
		}
	}
	n.startsAnew(t)
	n.container.undisturbed(t, mark)
}

// fileEmptied is a plain damage, for where it does not matter which one it is.
func fileEmptied() *damage {
	return &catalogue[slices.IndexFunc(catalogue, func(d damage) bool { return d.name == "file-emptied" })]
}

// staysDamaged fails unless nothing is healed, nothing is lied about, and the
// damaged layer is left as it is.
func (n *node) staysDamaged(t *testing.T, layer string, want []kit.Finding, reason string) {
	t.Helper()
	before := must[kit.Tree](t)(kit.Fingerprint(n.root(layer)))
	for _, r := range n.repairs(t, 1, map[string][]kit.Finding{layer: want}, "--apply") {
		if r.Healed || r.State != "damaged" {
			t.Errorf("repair reports of layer %s, which has no good blob: %+v", layer, r)
		}
		if !strings.Contains(r.Reason, "there is no good blob of it") || !strings.Contains(r.Reason, reason) {
			t.Errorf("the reason why layer %s was not healed is %q, want that there is no good blob, and %q", layer, r.Reason, reason)
		}
	}
	n.finds(t, map[string][]kit.Finding{layer: want})
	n.refused(t, layer)
	if diff := kit.Diff(before, must[kit.Tree](t)(kit.Fingerprint(n.root(layer))), 5); diff != "" {
		t.Errorf("layer %s was changed:\n%s", layer, diff)
	}
	if left, err := os.ReadDir(n.Daemon.Root + "/healing"); err != nil && !os.IsNotExist(err) || len(left) > 0 {
		t.Errorf("healing in vain has left %v, %v", left, err)
	}
}

// refused fails unless every caller that needs a damaged layer gets an error that
// names it and the reason.
func (n *node) refused(t *testing.T, layer string) {
	t.Helper()
	i := slices.Index(layerNames, layer)
	id := n.image.ChainIDs[i].String()
	isRefusal := func(what string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), id) || !strings.Contains(err.Error(), "is damaged") || !strings.Contains(err.Error(), "not healed") {
			t.Errorf("%s, although layer %s is damaged: %v", what, layer, err)
		}
	}
	isRefusal("a container was started", n.tryStart(t))
	_, err := n.Ctr(t.Context(), "snapshot", "--snapshotter", "durable", "info", id)
	isRefusal("stat", err)
	if i > 0 { // what is below has nothing to do with it
		n.readyToContainerd(t, i-1)
	}
	for _, r := range n.check(t, 1, "--cached") {
		other := n.layerOf(t, r.ID)
		switch {
		case other == layer:
			if r.State != "damaged" {
				t.Errorf("check --cached reports that layer %s is %s: %+v", layer, r.State, r)
			}
		case r.State == "unverified" && slices.Index(layerNames, other) > i:
			// After a boot it is not verified before what it stands on is whole.
		case r.State != "ready":
			t.Errorf("check --cached reports that layer %s is %s: %+v", other, r.State, r)
		}
	}
}

// TestNoGoodBlobAtBoot is TestNoGoodBlob through an unclean shutdown, with all blobs
// of the image bad: no layer is lost that was not damaged.
func TestNoGoodBlobAtBoot(t *testing.T) {
	for i, fs := range fileSystems {
		t.Run(fs, func(t *testing.T) {
			n := newNode(t, fs)
			good := map[string][]byte{}
			for i, layer := range layerNames {
				good[layer] = must[[]byte](t)(os.ReadFile(n.blob(layer)))
				check(t, badBlobs[i].do(n.blob(layer)))
			}
			n.uncleanShutdown(t)
			n.startsAnew(t) // nothing is damaged, and no blob is needed

			layer := everyLayer[i]
			check(t, os.RemoveAll(n.root(layer)))
			n.uncleanShutdown(t)
			n.finds(t, map[string][]kit.Finding{layer: gone})
			n.refused(t, layer)
			n.uncleanShutdown(t)
			n.refused(t, layer)

			for layer, content := range good {
				check(t, os.WriteFile(n.blob(layer), content, 0o444))
			}
			n.uncleanShutdown(t)
			n.startsAnew(t) // by itself: a boot heals what could not be healed before
			n.wholeAfterBoot(t)
		})
	}
}

// TestRemovedWhileDamaged: layers that are refused can be removed, in the order
// of containerd's garbage collector, and nothing of them is left. The next pull
// brings the image back.
func TestRemovedWhileDamaged(t *testing.T) {
	t.Parallel()
	n := newNode(t, "ext4")
	n.inflictAll(t)
	for _, layer := range everyLayer {
		check(t, os.Remove(n.blob(layer)))
	}
	if results := n.repair(t, 1, "--apply"); len(results) != len(everyLayer) {
		t.Errorf("repair reports %+v", results)
	}
	if err := n.tryStart(t); err == nil || !strings.Contains(err.Error(), "is damaged") {
		t.Errorf("a container was started on damaged layers: %v", err)
	}
	n.ctr(t, "image", "rm", "--sync", n.image.Ref)
	waitFor(t, 30*time.Second, func() error {
		entries, err := os.ReadDir(n.Daemon.Root + "/snapshots")
		if rows := kittest.Inspect(t, n.Daemon).Snapshots; err != nil || len(entries) > 0 || len(rows) > 0 {
			return fmt.Errorf("still there: %v, %v, %v", entries, rows, err)
		}
		return nil
	})
	n.ctr(t, "image", "pull", "--plain-http", "--snapshotter", "durable", n.image.Ref)
	n.startsAnew(t)
	n.clean(t)
}

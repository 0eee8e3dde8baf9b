package overlay

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"

	"github.com/durable-snapshotter/durable-snapshotter/internal/extract"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestExtract makes the tree of each layer of the generated images with containerd's
// applier and with ours: the trees are equal.
func TestExtract(t *testing.T) {
	disk := newDisk(t, "ext4")
	since, layers := time.Now().Add(-time.Second), 0
	for n := range uint64(*images) {
		for i, l := range generate(*seed, n) {
			raw := must[[]byte](t)(l.tar())
			dir := disk.Path("extract")
			theirs, ours := filepath.Join(dir, "theirs"), filepath.Join(dir, "ours")
			check(t, os.MkdirAll(theirs, 0o755))
			check(t, os.MkdirAll(ours, 0o755))
			o := extract.Options{Dir: ours, Tar: bytes.NewReader(raw)}
			var opts []archive.ApplyOpt
			if i > 0 {
				opts = append(opts, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
			} else {
				o.Whiteouts = extract.Remove // the lowest layer has no overlay mount
			}
			_, want := archive.Apply(t.Context(), theirs, bytes.NewReader(raw), opts...)
			_, err := extract.Apply(t.Context(), o)
			if (want == nil) != (err == nil) {
				t.Fatalf("image %d of seed %d, layer %d: containerd: %v, ours: %v\n%v", n, *seed, i+1, want, err, image{l})
			}
			if err == nil {
				a, b := layerTree(t, theirs, since), layerTree(t, ours, since)
				if text := kit.Diff(a, b, 8); text != "" {
					t.Fatalf("image %d of seed %d, layer %d: %s\n%v", n, *seed, i+1, text, image{l})
				}
				layers++
			}
			check(t, os.RemoveAll(dir))
		}
	}
	if layers < *images {
		t.Errorf("only %d layers of %d images could be compared", layers, *images)
	}
}

// layerTree is the tree of a layer, without the times that the kernel has set: of the root, of
// directories without an entry and of whiteouts.
func layerTree(t *testing.T, dir string, since time.Time) kit.Tree {
	t.Helper()
	tree := must[kit.Tree](t)(kit.Fingerprint(dir))
	now := time.Now()
	for name, e := range tree {
		if e.Mtime.After(since) && e.Mtime.Before(now) {
			tree.Untime(name)
		}
	}
	return tree
}

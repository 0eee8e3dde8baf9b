package full

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
)

// TestDamaged cuts the power under a node with damaged layers, while those that
// have a good blob heal and the images of the others are dropped and pulled
// again: no image is dropped whose damaged layers have good blobs. Then such an
// image is dropped by hand: if the harness did not call that a lie, it would not
// see the daemon do it.
func TestDamaged(t *testing.T) {
	r := record(t, Setup{FS: disk.Ext4, Daemon: ours("record"), Name: "damaged", Damage: Damaged})
	t.Logf("damaged: %v; without a good blob: %v", r.Record.Damaged, r.Record.Hopeless)
	t.Run("power cut", func(t *testing.T) { survives(t, r, 10) })
	t.Run("blob is back", func(t *testing.T) { blobIsBack(t, r) })
	t.Run("dropped by hand", func(t *testing.T) { dropIsSeen(t, r) })
}

// blobIsBack examines a state in which a pull has brought the missing blobs, and
// containerd, which deletes the row of a dropped layer before it calls Remove, has
// not come to that: what had no good blob heals.
func blobIsBack(t *testing.T, r *Recording) {
	tally := run(t, &Check{Recording: r, Cases: atFirst(r), spoil: func(mountpoint string) error {
		var errs []error
		for _, d := range bench.blobs() {
			good, err := os.ReadFile(bench.registry.Blob(d))
			errs = append(errs, err, os.WriteFile(blobFile(mountpoint, d.Encoded()), good, 0o444))
		}
		return errors.Join(errs...)
	}})
	if !tally.Clean() || tally.Equal != len(bench.images) {
		t.Errorf("%d of %d images are what they should be: %v", tally.Equal, len(bench.images), tally.Bad)
	}
}

// TestAstray gives the daemon a content store that is not containerd's: the blobs
// of damaged layers are not in it, and are good. Nothing may be dropped.
func TestAstray(t *testing.T) {
	r := record(t, Setup{FS: disk.Ext4, Daemon: ours("record"), Name: "astray", Damage: Astray})
	tally := run(t, &Check{Recording: r, Cases: atFirst(r)})
	if !tally.Clean() || tally.Survived == 0 {
		t.Errorf("%d survived: %v", tally.Survived, tally.Bad)
	}
}

// atFirst is the state from before the first write of the log.
func atFirst(r *Recording) []state.Case {
	return []state.Case{{State: state.State{Point: r.Start, Class: state.Prefix}, Points: []int{r.Start}}}
}

// dropIsSeen deletes the name of an image by hand that must stay. containerd
// collects its blobs and its snapshots then.
func dropIsSeen(t *testing.T, r *Recording) {
	stays := stay(t, r)
	tally := run(t, &Check{Recording: r, Cases: atFirst(r), meddle: func(ctx context.Context, n *node) error {
		return n.remove(ctx, stays.Ref)
	}})
	for _, bad := range tally.Bad {
		for _, f := range bad.Findings {
			missing := slices.DeleteFunc([]string{"its name", "blob " + stays.Config.Digest.String(), "snapshot " + stays.Top()}, func(part string) bool {
				return strings.Contains(f.Detail, part)
			})
			if f.Kind == oracle.Lie && f.Name == stays.Ref && len(missing) == 0 {
				return
			}
		}
	}
	t.Errorf("no lie about %s that has its name, config and top snapshot in it: %v", stays.Ref, tally.Bad)
}

// stay returns an image that has a damaged layer and must stay.
func stay(t *testing.T, r *Recording) Image {
	t.Helper()
	damaged := func(image Image, names ...string) bool {
		for _, name := range names {
			for _, id := range image.ChainIDs {
				if chainID(name) == id {
					return true
				}
			}
		}
		return false
	}
	for _, image := range bench.images {
		if damaged(image, r.Record.Hopeless...) {
			continue
		}
		for name := range r.Record.Damaged {
			if damaged(image, name) {
				return image
			}
		}
	}
	t.Fatalf("no image is damaged and must stay: %v, %v", r.Record.Damaged, r.Record.Hopeless)
	return Image{}
}

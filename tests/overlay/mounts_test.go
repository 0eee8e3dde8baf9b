package overlay

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	stock "github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/opencontainers/go-digest"
)

// TestMountsOfManyLayers mounts what the snapshotter hands out with containerd's
// code, for as many layers as the built-in snapshotter's mounts can have; the
// kernel takes 500 (OVL_MAX_STACK in fs/overlayfs/params.h), and mount(2) a page
// of options.
func TestMountsOfManyLayers(t *testing.T) {
	dir := newDisk(t, "ext4").Path()
	d := startDaemon(t, "", filepath.Join(dir, "durable"), "")
	ours := must[snapshots.Snapshotter](t)(d.Snapshotter())
	defer ours.Close()
	builtin := must[snapshots.Snapshotter](t)(stock.NewSnapshotter(filepath.Join(dir, "durable/stok")))
	defer builtin.Close()

	ctx, layer, counts := t.Context(), 0, []int{1, 2, 70, 128, 300, 440, 500}
	for _, count := range counts {
		for ; layer < count; layer++ {
			for _, sn := range []snapshots.Snapshotter{ours, builtin} {
				addLayer(t, sn, layer)
			}
		}
		for what, c := range map[string]struct {
			key  string
			make func(context.Context, snapshots.Snapshotter, string, string) ([]mount.Mount, error)
		}{
			"extraction": {"extract-1-abcd " + digest.FromString(fmt.Sprint(count)).String(), prepare},
			"container":  {fmt.Sprint("container ", count), prepare},
			"view": {fmt.Sprint("view ", count), func(ctx context.Context, sn snapshots.Snapshotter, key, parent string) ([]mount.Mount, error) {
				return sn.View(ctx, key, parent)
			}},
		} {
			t.Run(fmt.Sprint(count, " ", what), func(t *testing.T) {
				top := layerName(layer - 1)
				theirs := must[[]mount.Mount](t)(c.make(ctx, builtin, c.key, top))
				mounts := must[[]mount.Mount](t)(c.make(ctx, ours, c.key, top))
				again := must[[]mount.Mount](t)(ours.Mounts(ctx, c.key))
				if fmt.Sprint(again) != fmt.Sprint(mounts) {
					t.Errorf("later the mounts are %v, at first %v", again, mounts)
				}
				limit := showsLayers(ctx, theirs, count)
				if err := showsLayers(ctx, mounts, count); err != nil && limit == nil {
					t.Errorf("%v; the built-in snapshotter's can be mounted", err)
				} else if limit != nil {
					t.Logf("the built-in snapshotter's cannot be mounted: %.200v; ours: %v", limit, err == nil)
				}
				if what == "extraction" {
					hidden := hiddenFromApplier(t, mounts)
					if !hidden && count < 400 {
						t.Errorf("the applier finds the parents in %v", mounts)
					}
					t.Logf("%d bytes of options, parents hidden from the applier: %v", len(strings.Join(mounts[0].Options, ",")), hidden)
				}
			})
		}
	}
}

func layerName(n int) string { return fmt.Sprintf("layer %d", n) }

func addLayer(t *testing.T, sn snapshots.Snapshotter, n int) {
	t.Helper()
	parent := ""
	if n > 0 {
		parent = layerName(n - 1)
	}
	key := fmt.Sprint("key ", n)
	upper := upperdir(t, must[[]mount.Mount](t)(sn.Prepare(t.Context(), key, parent)))
	check(t, touchFile(upper, fmt.Sprint(n)))
	check(t, sn.Commit(t.Context(), layerName(n), key))
}

func prepare(ctx context.Context, sn snapshots.Snapshotter, key, parent string) ([]mount.Mount, error) {
	return sn.Prepare(ctx, key, parent)
}

// showsLayers mounts, verifies the file of every layer, and makes one where it
// can.
func showsLayers(ctx context.Context, mounts []mount.Mount, layers int) error {
	return mount.WithTempMount(ctx, mounts, func(root string) (err error) {
		for n := range layers {
			_, e := os.Lstat(filepath.Join(root, fmt.Sprint(n)))
			err = errors.Join(err, e)
		}
		if mounts[0].ReadOnly() || !strings.Contains(strings.Join(mounts[0].Options, ","), "upperdir=") {
			return err
		}
		return errors.Join(err, touchFile(root, "written"))
	})
}

// hiddenFromApplier reads lowerdir as containerd's applier does (getOverlayPath
// in core/diff/apply/apply_linux.go).
func hiddenFromApplier(t *testing.T, mounts []mount.Mount) bool {
	t.Helper()
	for _, o := range mounts[0].Options {
		if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok {
			for _, dir := range strings.Split(dirs, ":") {
				if _, err := os.Lstat(dir); err == nil {
					return false
				}
			}
		}
	}
	return true
}

package readiness

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// records are what containerd has on record in the namespace of the CRI.
type records struct {
	ctx context.Context
	cl  *client.Client
}

func (n *node) containerdRecords(t testing.TB) records {
	t.Helper()
	ctx, cl := n.client(t)
	return records{ctx, cl}
}

// names are the names of an image.
func (r records) names(img kit.Pushed) (names []string, err error) {
	all, err := r.cl.ImageService().List(r.ctx)
	for _, i := range all {
		if i.Target.Digest == img.Manifest {
			names = append(names, i.Name)
		}
	}
	return names, err
}

// dropLeases are the leases of drops.
func (r records) dropLeases() (ids []string, err error) {
	all, err := r.cl.LeasesService().List(r.ctx)
	for _, l := range all {
		if strings.HasPrefix(l.ID, repull.LeasePrefix) {
			ids = append(ids, l.ID)
		}
	}
	return ids, err
}

// abandoned are the extraction keys that containerd has and the snapshotter has not. A
// lease names them also when they are gone; only the text of the error shows whether it
// is containerd's own (core/metadata/snapshot.go, getKey).
func (r records) abandoned() (keys []string, err error) {
	all, err := r.cl.LeasesService().List(r.ctx)
	for _, l := range all {
		resources, err := r.cl.LeasesService().ListResources(r.ctx, l)
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
		for _, o := range resources {
			if o.Type != "snapshots/durable" || !strings.HasPrefix(o.ID, "extract-") {
				continue
			}
			_, err := r.cl.SnapshotService("durable").Stat(r.ctx, o.ID)
			if errdefs.IsNotFound(err) && !strings.Contains(err.Error(), "snapshot "+o.ID+" does not exist") {
				keys = append(keys, o.ID)
			}
		}
	}
	return keys, err
}

func (n *node) names(t testing.TB, img kit.Pushed) []string {
	t.Helper()
	return must[[]string](t)(n.containerdRecords(t).names(img))
}

func (n *node) dropLeases(t testing.TB) []string {
	t.Helper()
	return must[[]string](t)(n.containerdRecords(t).dropLeases())
}

// waitNoDropLease waits until no lease of a drop is left.
func (n *node) waitNoDropLease(t testing.TB, when string) {
	t.Helper()
	r := n.containerdRecords(t)
	waitFor(t, 20*time.Second, func() error {
		leases, err := r.dropLeases()
		if err == nil && len(leases) > 0 {
			err = fmt.Errorf("%s, and leases %q are left", when, leases)
		}
		return err
	})
}

// wantAnchored fails the test when app has a name and its damaged layer, number 1, is
// gone from containerd: such a name would stay for ever, and no pull with IfNotPresent
// would bring the layer.
func (n *node) wantAnchored(t testing.TB) {
	t.Helper()
	ctx, cl := n.client(t)
	names := n.names(t, n.app)
	if _, err := cl.SnapshotService("durable").Stat(ctx, n.app.ChainIDs[1].String()); errdefs.IsNotFound(err) && len(names) > 0 {
		t.Errorf("the names %q are there, and the damaged layer is not", names)
	}
}

// wantNothing removes all images and leases, has containerd collect, and fails the test
// unless nothing is left of them.
func (n *node) wantNothing(t *testing.T) {
	t.Helper()
	ctx, cl := n.client(t)
	all, err := cl.ImageService().List(ctx)
	check(t, err)
	for _, i := range all {
		check(t, cl.ImageService().Delete(ctx, i.Name))
	}
	leases, err := cl.LeasesService().List(ctx)
	check(t, err)
	for _, l := range leases {
		if strings.HasPrefix(l.ID, repull.LeasePrefix) {
			t.Errorf("lease %s is left", l.ID)
			continue
		}
		check(t, cl.LeasesService().Delete(ctx, l)) // of pulls that have died
	}
	n.collect(t)
	n.waitEmpty(t)
	if left := must[string](t)(n.ctr(t, "content", "ls", "-q")); left != "" {
		t.Errorf("blobs are left: %s", left)
	}
}

// waitEmpty waits until the daemon has no rows and no directories.
func (n *node) waitEmpty(t *testing.T) {
	t.Helper()
	waitFor(t, time.Minute, func() error {
		dirs := must[[]os.DirEntry](t)(os.ReadDir(filepath.Join(n.Daemon.Root, "snapshots")))
		dirs = slices.DeleteFunc(dirs, func(d os.DirEntry) bool { return strings.HasSuffix(d.Name(), ".away") })
		if rows := n.rows(t); len(rows)+len(dirs) > 0 {
			return fmt.Errorf("left: rows %q, directories %v", rows, dirs)
		}
		return nil
	})
}

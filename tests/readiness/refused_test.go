package readiness

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// refused pulls app and has a drop of it fail: a snapshot that is no extraction stands on
// it, of which the daemon has lost its row, so that only containerd knows of it.
func (n *node) refused(t *testing.T) {
	t.Helper()
	check(t, n.pull(t, n.app))
	ctx, cl := n.client(t)
	ctx, release, err := cl.WithLease(ctx)
	check(t, err)
	t.Cleanup(func() { release(context.WithoutCancel(ctx)) })
	_, err = cl.SnapshotService("durable").Prepare(ctx, "strange", n.app.Top())
	check(t, err)
	n.forget(t, "strange")
	n.lose(t, n.app)
	if err := n.pull(t, n.app); err == nil {
		t.Fatal("a pull succeeds without the layer")
	}
	waitFor(t, time.Minute, func() error {
		if log := must[string](t)(n.Daemon.Log()); !strings.Contains(log, "cannot remove snapshot with child") {
			return errors.New("no drop was refused")
		}
		return nil
	})
}

// forget removes the daemon's row of a snapshot behind containerd's back.
func (n *node) forget(t *testing.T, key string) {
	t.Helper()
	sn := must[snapshots.Snapshotter](t)(n.Daemon.Snapshotter())
	defer sn.Close()
	for _, row := range n.rows(t) {
		if strings.HasSuffix(row, "/"+key) {
			check(t, sn.Remove(t.Context(), row))
			return
		}
	}
	t.Fatalf("the daemon has no row of %s", key)
}

// TestDropRefused: containerd refuses to remove a snapshot on the damaged layer, for a
// reason that nothing shows. The names stay, and no lease does. When the reason is gone,
// the drop is done.
func TestDropRefused(t *testing.T) {
	t.Parallel()
	n := newNodeWith(t, nodeOptions{acts: true})
	n.refused(t)
	if names := n.names(t, n.app); len(names) != 3 {
		t.Errorf("a drop was refused, and of the names there are %q", names)
	}
	n.waitNoDropLease(t, "a drop was refused")
	ctx, cl := n.client(t)
	check(t, cl.SnapshotService("durable").Remove(ctx, "strange"))
	waitFor(t, time.Minute, func() error { return n.pull(t, n.app) })
	n.prints(t, n.app, "third layer\n")
}

// linked pulls app, and has an extraction on layer i collected, as containerd does with
// those of a client that has died. containerd keeps a link to it for ever.
func (n *node) linked(t *testing.T, i int) {
	t.Helper()
	check(t, n.pull(t, n.app))
	ctx, cl := n.client(t)
	lease := must[leases.Lease](t)(cl.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(time.Hour)))
	key := fmt.Sprintf(snapshots.UnpackKeyFormat, "dead", digest.FromString("a layer of another image"))
	sn := cl.SnapshotService("durable")
	_, err := sn.Prepare(leases.WithLease(ctx, lease.ID), key, n.app.ChainIDs[i].String())
	check(t, err)
	check(t, cl.LeasesService().Delete(ctx, lease, leases.SynchronousDelete))
	// Another dead pull has left a lease, which names layers that are long gone.
	other := must[leases.Lease](t)(cl.LeasesService().Create(ctx, leases.WithRandomID(), leases.WithExpiration(time.Hour)))
	for _, gone := range []string{"sibling", "other"} {
		check(t, cl.LeasesService().AddResource(ctx, other, leases.Resource{ID: digest.FromString(gone).String(), Type: "snapshots/durable"}))
	}
	waitFor(t, time.Minute, func() error {
		if _, err := sn.Stat(ctx, key); !errdefs.IsNotFound(err) {
			return fmt.Errorf("the extraction was not collected: %v", err)
		}
		return nil
	})
}

// TestDropPastLinks: containerd refuses to remove the damaged layer, or one on it,
// because of a link to a snapshot that is not there any more.
func TestDropPastLinks(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		on    string
		layer int
	}{{"the damaged layer", 1}, {"the layer on it", 2}} {
		t.Run(c.on, func(t *testing.T) {
			n := newNodeWith(t, nodeOptions{acts: true})
			n.linked(t, c.layer)
			n.lose(t, n.app)
			waitFor(t, time.Minute, func() error { return n.pull(t, n.app) })
			n.prints(t, n.app, "third layer\n")
			n.waitNoDropLease(t, "the pull is done")
			n.wantNothing(t)
		})
	}
}

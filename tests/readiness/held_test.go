package readiness

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"

	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
)

// TestDropHeld: nothing changes while a container holds the damaged layer, running
// or not. The error names it, and both of its cures work.
func TestDropHeld(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	p := n.inUse(t)
	ended := must[string](t)(p.create(t, n.app, "echo"))
	check(t, p.start(t, ended))
	running := must[string](t)(p.create(t, n.app, "wait"))
	check(t, p.start(t, running))
	n.damage(t, n.app, 1)
	bad := n.app.Layers[1].Digest
	check(t, breaks["corrupt"](n.Blob(bad)))

	before := n.records(t)
	_, err := n.drop(t, n.app, 1)
	var held *repull.HeldError
	if !errors.As(err, &held) || !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("Drop of a layer that containers hold: %v", err)
	}
	for _, id := range []string{ended + " (default/" + p.Name() + "/container", running + " (default/" + p.Name() + "/container"} {
		if !strings.Contains(err.Error(), id) {
			t.Errorf("the error does not name %s: %v", id, err)
		}
	}
	if len(held.Holders) != 2 {
		t.Errorf("holders: %q", held.Holders)
	}
	if after := n.records(t); after != before {
		t.Errorf("Drop changed containerd's records to\n%s\nfrom\n%s", after, before)
	}

	t.Run("pause", func(t *testing.T) {
		n.damage(t, n.pause, 0)
		defer n.damage(t, n.app, 1)
		check(t, breaks["corrupt"](n.Blob(n.pause.Layers[0].Digest)))
		defer func() { check(t, breaks["corrupt"](n.Blob(n.pause.Layers[0].Digest))) }()
		if _, err := n.drop(t, n.pause, 0); err == nil || !strings.Contains(err.Error(), "sandbox "+p.ID+" (default/"+p.Name()+")") {
			t.Errorf("Drop of the pause image of a pod that runs: %v", err)
		}
	})
	t.Run("fetch", func(t *testing.T) {
		// Without the manifest, the good blobs would be garbage.
		check(t, breaks["corrupt"](n.Blob(n.app.Manifest)))
		o := n.options(t)
		o.BlobsOfHeld = true
		_, err := n.dropWith(t, n.app, 1, o)
		if !errors.As(err, &held) || len(held.Blobs) != 1 || held.Blobs[0].Digest != bad {
			t.Fatalf("Drop of bad blobs only: %v", err)
		}
		_, command, ok := strings.Cut(err.Error(), "ctr -n k8s.io ")
		if !ok {
			t.Fatalf("no command in %v", err)
		}
		check(t, breaks["corrupt"](n.Blob(n.app.Manifest))) // the same bit back
		must[string](t)(n.ctr(t, append(strings.Fields(command), "--plain-http")...))
		body := must[[]byte](t)(os.ReadFile(n.Blob(bad)))
		if digest.FromBytes(body) != bad {
			t.Errorf("blob %s is still corrupt", bad)
		}
	})
	t.Run("remove", func(t *testing.T) {
		check(t, breaks["corrupt"](n.Blob(bad)))
		p.removeContainer(t, ended)
		if _, err := n.drop(t, n.app, 1); !errors.As(err, &held) || len(held.Holders) != 1 {
			t.Errorf("with the one that runs: %v", err)
		}
		p.removeContainer(t, running)
		must[repull.Dropped](t)(n.drop(t, n.app, 1))
		n.usable(t, p, n.app)
	})
}

// TestDropStrangers: what stands on the damaged layer and belongs to no image goes
// with it when no client can be using it, and else is named as what holds it.
func TestDropStrangers(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	p := n.inUse(t)
	ctx, cl := n.client(t)
	sn := cl.SnapshotService("durable")
	ctx, release, err := cl.WithLease(ctx) // as every unpacking has one
	check(t, err)
	defer release(ctx)
	on := n.app.ChainIDs[1].String()
	prepare := func(key string) {
		t.Helper()
		_, err := sn.Prepare(ctx, key, on)
		check(t, err)
	}
	prepare("extract-1-left " + n.app.Top())
	prepare("to commit")
	check(t, sn.Commit(ctx, "a/committed/one", "to commit"))
	prepare("operator's")
	n.damage(t, n.app, 1)
	check(t, breaks["corrupt"](n.Blob(n.app.Layers[1].Digest)))

	var held *repull.HeldError
	if _, err := n.drop(t, n.app, 1); !errors.As(err, &held) || !slices.Equal(held.Holders, []string{"snapshot operator's"}) {
		t.Fatalf("Drop with a snapshot of an operator on top: %v", err)
	}
	check(t, sn.Remove(ctx, "operator's"))
	must[repull.Dropped](t)(n.drop(t, n.app, 1))
	n.wantNoKeys(t, n.app, 1)
	for _, row := range n.rows(t) {
		if strings.Contains(row, "left") || strings.Contains(row, "committed") {
			t.Errorf("still there: %s", row)
		}
	}
	n.usable(t, p, n.app)
}

// records is what containerd has on record of images, blobs and snapshots.
func (n *node) records(t testing.TB) string {
	t.Helper()
	n.between.answerWith(codes.OK) // or the list of snapshots would be an error
	defer n.damage(t, n.app, 1)
	var all []string
	for _, args := range [][]string{{"images", "ls", "-q"}, {"content", "ls", "-q"}, {"snapshots", "--snapshotter", "durable", "ls"}, {"leases", "ls"}} {
		all = append(all, must[string](t)(n.ctr(t, args...)))
	}
	return strings.Join(all, "")
}

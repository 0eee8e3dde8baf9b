package readiness

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// The ways to pull.
const (
	byCRI      = "CRI"
	byTransfer = "transfer service"
	byClient   = "client"
)

func (n *node) pullBy(ctx context.Context, way string, img kit.Pushed) error {
	if way == byCRI {
		return n.CRI.Pull(ctx, img.Ref)
	}
	args := []string{"--namespace", k8s, "images", "pull", "--plain-http", "--snapshotter", "durable"}
	if way == byClient {
		args = append(args, "--local")
	}
	_, err := n.Containerd.Ctr(ctx, append(args, img.Ref)...)
	return err
}

// breakOff pulls an image. When the daemon has committed the top layer, and containerd
// waits for the answer, containerd is killed, or else the client.
func (n *node) breakOff(t *testing.T, way string, killContainerd bool, img kit.Pushed) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var once sync.Once
	broken := make(chan struct{})
	n.between.call(nil, func(call context.Context, name string) {
		if !strings.HasSuffix(name, img.Top()) {
			return
		}
		once.Do(func() {
			defer close(broken)
			if killContainerd {
				if err := n.Containerd.Kill(); err != nil {
					t.Error(err)
				}
				return
			}
			cancel()
			select {
			case <-call.Done(): // containerd has canceled the call
			case <-time.After(time.Minute):
				t.Error("containerd goes on without its client")
			}
		})
	})
	if err := n.pullBy(ctx, way, img); err == nil {
		t.Fatal("the pull was not broken off")
	}
	<-broken
	n.between.call(nil, nil)
	if killContainerd {
		n.restart(t)
	}
}

// lose takes the tree and the blob of layer 1 of an image away.
func (n *node) lose(t *testing.T, img kit.Pushed) {
	t.Helper()
	dir := filepath.Dir(n.directories(t, img)[1])
	check(t, os.Remove(n.Blob(img.Layers[1].Digest)))
	check(t, os.Rename(dir, dir+".away"))
}

// prints fails the test unless a container prints what the top layer of an image has.
func (n *node) prints(t *testing.T, img kit.Pushed, want string) {
	t.Helper()
	if out, err := n.ctr(t, "run", "--rm", "--snapshotter", "durable", img.Ref, "prints", "/bin/guest", "cat", "/etc/motd"); err != nil || out != want {
		t.Errorf("a container of %s: %q, %v; want %q", img.Ref, out, err, want)
	}
}

// past is what goes wrong when a layer is lost on which a key stands that only
// containerd has, and an image with a name.
func (n *node) past(t *testing.T, way string, killContainerd bool) (problems []string) {
	t.Helper()
	base := must[kit.Image](t)(kit.Runnable(t.Context()))
	sibling := n.push(t, "sibling", kit.Image{Cmd: base.Cmd, Layers: []kit.Layer{
		base.Layers[0], base.Layers[1], kit.NewLayer(kit.Gzip, kit.Dir("etc", 0o755), kit.File("etc/motd", 0o644, "the sibling\n")),
	}})
	check(t, n.pullBy(t.Context(), way, sibling))
	n.breakOff(t, way, killContainerd, n.app)
	r := n.containerdRecords(t)
	keys := must[[]string](t)(r.abandoned())
	if len(keys) != 1 {
		t.Fatalf("keys that only containerd has: %q", keys)
	}
	n.lose(t, sibling)

	ended, watched := make(chan struct{}), make(chan []string, 1)
	go func() { watched <- r.watch(sibling, keys[0], ended) }()
	waitFor(t, time.Minute, func() error {
		if log := must[string](t)(n.Daemon.Log()); strings.Contains(log, "cannot remove snapshot with child") {
			problems = append(problems, "the drop has met a child")
			return nil
		}
		return n.pullBy(t.Context(), way, sibling)
	})
	close(ended)
	if problems = append(problems, <-watched...); len(problems) > 0 {
		return problems
	}
	n.prints(t, sibling, "the sibling\n")
	check(t, n.pullBy(t.Context(), way, n.app))
	n.prints(t, n.app, "third layer\n")
	if keys := must[[]string](t)(r.abandoned()); len(keys) > 0 {
		problems = append(problems, fmt.Sprintf("the keys %q are left", keys))
	}
	n.waitNoDropLease(t, "the pull is done")
	n.wantNothing(t)
	return problems
}

// watch returns what must not be seen while a drop runs, until ended is closed: an image
// without names while the abandoned key is there, or more than one lease.
func (r records) watch(img kit.Pushed, key string, ended chan struct{}) (problems []string) {
	for {
		names, err := r.names(img)
		if err == nil && len(names) == 0 {
			if keys, err := r.abandoned(); err == nil && slices.Contains(keys, key) {
				problems = append(problems, fmt.Sprintf("the names are gone, and the key %s is there", key))
			}
		}
		if leases, err := r.dropLeases(); err == nil && len(leases) > 1 {
			problems = append(problems, fmt.Sprintf("leases %q", leases))
		}
		select {
		case <-ended:
			slices.Sort(problems)
			return slices.Compact(problems)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// TestDropPastAbandonedKeys: a pull has died between the daemon's Commit and
// containerd's, so that containerd has a key of which the daemon has no row. Later a
// layer below it is lost, and its blob. The image is dropped, no name goes while the
// key is in the way, the next pull is good, and the removal of all leaves nothing.
func TestDropPastAbandonedKeys(t *testing.T) {
	t.Parallel()
	for i, c := range []struct {
		way    string
		kills  bool // containerd; else the client dies, whose own unpacker would tidy up
		rebase bool
	}{
		{byCRI, true, false}, {byClient, true, false}, {byTransfer, true, true}, {byCRI, true, true}, {byClient, false, true},
	} {
		if !kittest.Turn(i, 2) {
			continue
		}
		t.Run(fmt.Sprintf("%s,containerd=%v,rebase=%v", strings.ReplaceAll(c.way, " ", "-"), c.kills, c.rebase), func(t *testing.T) {
			n := newNodeWith(t, nodeOptions{acts: true, rebase: c.rebase})
			for _, p := range n.past(t, c.way, c.kills) {
				t.Error(p)
			}
		})
	}
}

package readiness

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// containerd numbers a committed snapshot inside the transaction in which it also
// calls the snapshotter's Commit (core/metadata/snapshot.go:584-642). When that
// transaction is lost after the snapshotter has committed, the number is given out
// again, and the next Commit of the same layer uses a name that the snapshotter
// has, and containerd has not. Each test here makes that happen in a way of its own.
// The pull that meets the name was not disturbed by anything: it must succeed at the
// first try, and leave the image that its tars describe.

// modes are containerd's two ways to unpack layers: one after another, each on its
// parent, and several at a time, with the parent at Commit.
var modes = []struct {
	name   string
	rebase bool
}{{"rebase=off", false}, {"rebase=on", true}}

// colliding is a node with a puller.
type colliding struct {
	*node
	puller *kit.Puller
	models map[string]func(t testing.TB, namespace string) // by reference: fails unless the image is whole
}

func newColliding(t testing.TB, rebase, acts bool) *colliding {
	t.Helper()
	c := &colliding{node: newNodeWith(t, nodeOptions{acts: acts, rebase: rebase, extra: onlyOnRequest}), models: map[string]func(testing.TB, string){}}
	c.puller = &kit.Puller{CRI: c.CRI, Snapshotter: "durable"}
	if rebase {
		c.puller.Unpacks = rebaseUnpacks
	}
	c.connect(t)
	return c
}

// connect makes a new client: an old one would wait out the backoff of its
// connection after a start of containerd.
func (c *colliding) connect(t testing.TB) {
	t.Helper()
	c.puller.Client = must[*client.Client](t)(client.New(c.Containerd.Address))
	t.Cleanup(func() { c.puller.Client.Close() })
}

// image pushes an image of its own for each name: of one layer, or of three of which
// the upper ones have no entry for the directory that they write into.
func (c *colliding) image(t testing.TB, name string, layers int) kit.Pushed {
	t.Helper()
	img := kit.Image{Cmd: []string{"/x"}, Layers: []kit.Layer{
		kit.NewLayer(kit.Gzip, kit.Dir("priv", 0o700).WithOwner(1000, 1001), kit.File("priv/name", 0o600, name), kit.Dir("old", 0o755), kit.File("old/file", 0o644, "old")),
		kit.NewLayer(kit.Gzip, kit.File("priv/x/y", 0o644, "y of "+name), kit.Whiteout("old/file")),
		kit.NewLayer(kit.Gzip, kit.File("priv/x/z", 0o644, "z of "+name)),
	}[:layers]}
	pushed := c.push(t, name, img)
	want, links, err := img.Model()
	check(t, err)
	c.models[pushed.Ref] = func(t testing.TB, namespace string) {
		t.Helper()
		tree, got, err := c.puller.View(t.Context(), namespace, pushed.Top())
		if err != nil {
			t.Errorf("the pull has succeeded, and the image has no snapshot: %v", err)
			return
		}
		if text := kit.SameView(want, links, tree, got); text != "" {
			t.Errorf("the tree of %s differs from its tars:\n%s", name, text)
		}
	}
	return pushed
}

// wantPulled pulls an image once, and fails the test unless it is whole then.
func (c *colliding) wantPulled(t testing.TB, way kit.Way, namespace string, img kit.Pushed) {
	t.Helper()
	ctx, cancel := within(t)
	defer cancel()
	c.wantWhole(t, namespace, img, c.puller.Pull(ctx, way, namespace, img.Ref))
}

// wantWhole fails the test unless an undisturbed pull has succeeded, and the image is
// whole.
func (c *colliding) wantWhole(t testing.TB, namespace string, img kit.Pushed, pulled error) {
	t.Helper()
	if pulled != nil {
		t.Errorf("a pull that nothing has disturbed failed: %v", pulled)
		return
	}
	c.models[img.Ref](t, namespace)
}

// namespaceOf is where a way of pulling is tried.
func namespaceOf(way kit.Way) string {
	if way == kit.ByCRI {
		return k8s
	}
	return "by-" + string(way)
}

// onlyOnRequest is configuration of containerd: nothing is collected without a request.
// A collection would wait for the Prepare that is held, and everything for it.
const onlyOnRequest = "[plugins.'io.containerd.gc.v1.scheduler']\n  startup_delay = '0s'\n  deletion_threshold = 1000000\n  mutation_threshold = 1000000\n"

// collision holds two clients that unpack the same layers at the points where only
// one order of events is left: both have prepared their extractions; then the first
// one commits, and is cancelled before it has the answer. Until it is armed it
// holds nothing.
type collision struct {
	mu       sync.Mutex
	prepare  string             // end of the keys whose Prepare is held
	commit   string             // end of the name whose next Commit is held
	prepared chan chan struct{} // a Prepare is held, until the channel in it is closed
	answered chan struct{}      // a Commit is held, which the daemon has acknowledged
}

func (c *collision) arm(prepare, commit digest.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.prepare, c.commit = prepare.String(), commit.String()
	c.prepared, c.answered = make(chan chan struct{}, 8), make(chan struct{}, 1)
}

// before holds a Prepare.
func (c *collision) before(request any) {
	r, ok := request.(*snapshotsapi.PrepareSnapshotRequest)
	c.mu.Lock()
	held := ok && c.prepare != "" && strings.HasSuffix(r.Key, c.prepare)
	c.mu.Unlock()
	if held {
		release := make(chan struct{})
		c.prepared <- release
		select {
		case <-release:
		case <-time.After(receiveLimit): // the test has failed
		}
	}
}

// committed holds the answer to a Commit, once.
func (c *collision) committed(ctx context.Context, name string) {
	c.mu.Lock()
	held := c.commit != "" && strings.HasSuffix(name, c.commit)
	if held {
		c.commit = ""
	}
	c.mu.Unlock()
	if held {
		c.answered <- struct{}{}
		<-ctx.Done()
	}
}

// receiveLimit is when receive gives up.
const receiveLimit = 2 * time.Minute

// receive waits for something that another goroutine is about to send.
func receive[T any](t testing.TB, what string, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(receiveLimit):
		t.Fatalf("%s: nothing after %v", what, receiveLimit)
	}
	return v
}

// TestCollide: two clients pull the same image at the same time, and one of them is
// cancelled while its Commit is being answered. The other one pulls well.
func TestCollide(t *testing.T) {
	t.Parallel()
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			hold := &collision{}
			// A daemon that acts would request a collection after its start.
			c := newColliding(t, mode.rebase, false)
			c.between.call(hold.before, hold.committed)
			for _, layers := range []int{1, 3} {
				for _, way := range kit.Ways {
					t.Run(fmt.Sprintf("layers=%d,%s", layers, way), func(t *testing.T) {
						img := c.image(t, fmt.Sprintf("collide-%d-%s", layers, way), layers)
						c.collide(t, hold, way, namespaceOf(way), img, mode.rebase)
					})
				}
			}
		})
	}
}

// collide cancels a pull by the client library during its first Commit while
// another one, in the given way, is as far as it can be without a Commit.
func (c *colliding) collide(t *testing.T, hold *collision, way kit.Way, namespace string, img kit.Pushed, parallel bool) {
	t.Helper()
	first, last := img.ChainIDs[0], img.ChainIDs[0]
	if parallel {
		last = img.ChainIDs[len(img.ChainIDs)-1] // all are prepared before the first is committed
	}
	hold.arm(last, first)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	pulled := make(chan error, 1)
	go func() { pulled <- c.puller.Pull(ctx, kit.ByClient, namespace, img.Ref) }()
	one := receive(t, "Prepare of the client that is going to be cancelled", hold.prepared)
	undisturbed := make(chan error, 1)
	go func() { undisturbed <- c.puller.Pull(t.Context(), way, namespace, img.Ref) }()
	other := receive(t, "Prepare of the other client", hold.prepared)
	close(one)
	receive(t, "the daemon's answer to the Commit", hold.answered)
	cancel()
	if err := receive(t, "end of the cancelled pull", pulled); err == nil {
		t.Fatal("the pull that was to be cancelled has succeeded")
	}
	close(other)
	c.wantWhole(t, namespace, img, receive(t, "end of the other pull", undisturbed))
}

// TestLostRecords: containerd's root, or its meta.db alone, is deleted, as users are
// advised to do with a broken node; the snapshotter's is not. The first pull of each
// image succeeds.
func TestLostRecords(t *testing.T) {
	t.Parallel()
	for _, mode := range modes {
		for _, lost := range []string{".", "io.containerd.metadata.v1.bolt/meta.db"} {
			t.Run(fmt.Sprintf("%s,%s", mode.name, filepath.Base(filepath.Join("root", lost))), func(t *testing.T) {
				c := newColliding(t, mode.rebase, true)
				images := map[kit.Way][]kit.Pushed{}
				for _, way := range kit.Ways {
					for _, layers := range []int{1, 3} {
						img := c.image(t, fmt.Sprintf("lost-%d-%s", layers, way), layers)
						images[way] = append(images[way], img)
						c.wantPulled(t, way, namespaceOf(way), img)
					}
				}
				if t.Failed() {
					t.FailNow()
				}
				check(t, c.Containerd.Stop())
				check(t, os.RemoveAll(filepath.Join(c.Containerd.Root, lost)))
				c.restart(t)
				c.connect(t)
				for _, way := range kit.Ways {
					t.Run(string(way), func(t *testing.T) {
						for _, img := range images[way] {
							c.wantPulled(t, way, namespaceOf(way), img)
						}
					})
				}
			})
		}
	}
}

// TestNumbersBeginAnew: containerd collects an image while the daemon is down, so
// that its layers stay with the daemon, and the namespace is removed and made again,
// so that its numbers begin anew. The first pull succeeds.
func TestNumbersBeginAnew(t *testing.T) {
	t.Parallel()
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			c := newColliding(t, mode.rebase, true)
			c.stand(t)
			for _, way := range kit.Ways {
				t.Run(string(way), func(t *testing.T) {
					namespace := namespaceOf(way)
					img := c.image(t, "down-"+string(way), 3)
					c.wantPulled(t, way, namespace, img)
					check(t, c.Daemon.Stop())
					c.removeNamespace(t, namespace)
					check(t, c.Daemon.Start(t.Context()))
					// Until containerd has reached it, the node is not what it was.
					waitFor(t, 10*time.Second, func() error { return c.reached(t) })
					c.wantPulled(t, way, namespace, img)
				})
			}
		})
	}
}

// removeNamespace removes all images of a namespace, collects, and removes the
// namespace itself.
func (c *colliding) removeNamespace(t testing.TB, namespace string) {
	t.Helper()
	ctx, cancel := within(t)
	defer cancel()
	cl := c.puller.Client
	in := namespaces.WithNamespace(ctx, namespace)
	for _, img := range must[[]images.Image](t)(cl.ImageService().List(in)) {
		check(t, cl.ImageService().Delete(in, img.Name))
	}
	for _, l := range must[[]leases.Lease](t)(cl.LeasesService().List(in)) {
		check(t, cl.LeasesService().Delete(in, l))
	}
	waitFor(t, time.Minute, func() error {
		l, err := cl.LeasesService().Create(in, leases.WithRandomID())
		if err != nil {
			return err
		}
		// It fails with that of the snapshotter, which is down.
		_ = cl.LeasesService().Delete(in, l, leases.SynchronousDelete)
		err = cl.NamespaceService().Delete(ctx, namespace)
		if errdefs.IsNotFound(err) {
			err = nil
		}
		return err
	})
}

// standing is the key of a snapshot that is there all the time.
const standing = "standing"

// stand makes the snapshot for reached.
func (c *colliding) stand(t testing.TB) {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), standing)
	_, err := c.puller.Client.SnapshotService("durable").Prepare(ctx, standing, "", snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "a test"}))
	check(t, err)
}

// reached requests from containerd what only the daemon can answer, and changes nothing.
func (c *colliding) reached(t testing.TB) error {
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(t.Context(), standing), 10*time.Second)
	defer cancel()
	_, err := c.puller.Client.SnapshotService("durable").Mounts(ctx, standing)
	return err
}

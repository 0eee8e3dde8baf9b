package readiness

import (
	"context"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/defects"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// k8s is the namespace of the CRI plugin.
const k8s = kit.CRINamespace

// node is a node with the CRI plugin, two images in its registry, and something
// between containerd and the daemon that can answer instead.
type node struct {
	*kit.Node
	between    *interceptor
	pause, app kit.Pushed
	started    int // length of containerd's log at its latest start
}

// rebaseUnpacks is how many layers containerd unpacks at a time with nodeOptions.rebase.
const rebaseUnpacks = 3

// nodeOptions change what newNodeWith starts.
type nodeOptions struct {
	acts   bool   // the daemon may heal, and notify containerd; else it only answers
	images string // further keys of the configuration of the CRI's images
	rebase bool   // containerd unpacks three layers at a time

	contentRoot string // of the daemon that acts, below the disk; containerd's unless set
	mutant      string // a defect that is planted in the daemon
	extra       string // further text for containerd's configuration
}

// newNode starts a node that has pulled nothing yet, and whose daemon only answers.
func newNode(t testing.TB) *node {
	t.Helper()
	return newNodeWith(t, nodeOptions{})
}

func newNodeWith(t testing.TB, o nodeOptions) *node {
	t.Helper()
	r := must[*kit.Registry](t)(kit.StartRegistry(filepath.Join(scratch(t), "registry")))
	n := &node{}
	push := func(name string, img kit.Image) kit.Pushed {
		return must[kit.Pushed](t)(kit.Push(t.Context(), r, name, img))
	}
	app := must[kit.Image](t)(kit.Runnable(t.Context()))
	n.app = push("app", app)
	// Other chains than those of app: what befalls one image must not touch the
	// other. They have a blob in common, as images have.
	n.pause = push("pause", kit.Image{
		Cmd:    []string{"/bin/guest", "wait"},
		Layers: []kit.Layer{kit.NewLayer(kit.Gzip, kit.Dir("proc", 0o555), kit.Dir("sys", 0o555), kit.Dir("dev", 0o755)), app.Layers[1]},
	})
	k := kit.NodeOptions{
		Registry: r, Heals: o.acts, Notifies: o.acts, ContentRoot: o.contentRoot,
		Containerd: kit.ContainerdOptions{Extra: o.extra, CRI: &kit.CRIOptions{Pause: n.pause.Ref, Images: o.images}},
	}
	if o.mutant != "" {
		k.Daemon.Binary, k.Daemon.Env = must[string](t)(faulty()), []string{defects.Activate(o.mutant)}
	}
	if o.rebase {
		k.Containerd.Unpacks = rebaseUnpacks
	}
	n.Node = kittest.NewNode(t, k)
	n.between = listen(t, n.Daemon.Address)
	n.Through(n.between.address)
	kittest.Start(t, n.Node)
	return n
}

func (n *node) push(t testing.TB, name string, img kit.Image) kit.Pushed {
	t.Helper()
	return must[kit.Pushed](t)(n.Push(t.Context(), name, img))
}

// restart restarts containerd, or starts it when it was killed, and waits for the
// CRI plugin.
func (n *node) restart(t testing.TB) {
	t.Helper()
	if n.Containerd.Running() {
		check(t, n.Containerd.Stop())
	}
	n.started = len(must[string](t)(n.Containerd.Log()))
	check(t, n.StartContainerd(t.Context()))
}

// client returns a client of containerd in the CRI's namespace, and its context.
func (n *node) client(t testing.TB) (context.Context, *client.Client) {
	t.Helper()
	ctx, cl, err := n.Client(t.Context())
	check(t, err)
	t.Cleanup(func() { cl.Close() })
	return ctx, cl
}

// ctr runs ctr in the CRI's namespace.
func (n *node) ctr(t testing.TB, args ...string) (string, error) { return n.Ctr(t.Context(), args...) }

// backend returns the daemon's own names of an image's committed snapshots, lowest
// first. Of a layer that is there twice it is the later: containerd has forgotten
// the other, and not collected it yet.
func (n *node) backend(t testing.TB, img kit.Pushed) []string {
	t.Helper()
	sn := must[snapshots.Snapshotter](t)(n.Daemon.Snapshotter())
	defer sn.Close()
	names, numbers := make([]string, len(img.ChainIDs)), make([]int, len(img.ChainIDs))
	check(t, sn.Walk(t.Context(), func(_ context.Context, info snapshots.Info) error {
		part := strings.SplitN(info.Name, "/", 3)
		number, err := strconv.Atoi(part[1])
		for i, id := range img.ChainIDs {
			if info.Kind == snapshots.KindCommitted && part[0] == k8s && part[2] == id.String() && number > numbers[i] {
				names[i], numbers[i] = info.Name, number
			}
		}
		return err
	}))
	if slices.Contains(names, "") {
		t.Fatalf("the daemon has only the snapshots %q of %s", names, img.Ref)
	}
	return names
}

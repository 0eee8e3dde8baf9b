package readiness

import (
	"context"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// k8s is the namespace of the CRI plugin.
const k8s = kit.CRINamespace

// node is what a Kubernetes node has below the kubelet: containerd with its CRI
// plugin, the daemon, and a registry to pull from.
type node struct {
	registry   *kit.Registry
	daemon     *kit.Daemon
	between    *sayer
	containerd *kit.Containerd
	pause, app kit.Pushed
	cri        *kit.CRI
	started    int // length of containerd's log at its latest start
}

// nodeOptions change what newNodeWith starts.
type nodeOptions struct {
	acts   bool   // the daemon may heal, and tell containerd; else it only answers
	images string // further keys of the configuration of the CRI's images
}

// newNode starts a node that has pulled nothing yet, and whose daemon only answers.
func newNode(t testing.TB) *node {
	t.Helper()
	return newNodeWith(t, nodeOptions{})
}

func newNodeWith(t testing.TB, o nodeOptions) *node {
	t.Helper()
	n := &node{registry: must[*kit.Registry](t)(kit.StartRegistry(filepath.Join(scratch(t), "registry")))}
	t.Cleanup(func() {
		if err := n.stopRegistry(); err != nil {
			t.Error(err)
		}
	})
	app := must[kit.Image](t)(kit.Runnable(t.Context()))
	n.app = n.push(t, "app", app)
	// Other chains than those of app: what befalls one image must not touch the
	// other. They have a blob in common, as images have.
	n.pause = n.push(t, "pause", kit.Image{
		Cmd:    []string{"/bin/guest", "wait"},
		Layers: []kit.Layer{kit.NewLayer(kit.Gzip, kit.Dir("proc", 0o555), kit.Dir("sys", 0o555), kit.Dir("dev", 0o755)), app.Layers[1]},
	})

	disk := kittest.NewDisk(t, kit.DiskOptions{})
	run := scratch(t)
	d := kit.DaemonOptions{Dir: disk.Path("durable")}
	if o.acts {
		d.ContentRoot = disk.Path("containerd", "root", "io.containerd.content.v1.content")
		d.Containerd = filepath.Join(run, "containerd.sock")
	}
	n.daemon = kittest.StartDaemon(t, d)
	n.between = listen(t, n.daemon.Address)
	n.containerd = kittest.StartContainerd(t, kit.ContainerdOptions{
		Dir: disk.Path("containerd"), RunDir: run,
		Daemon: &kit.Daemon{Root: n.daemon.Root, Address: n.between.address},
		CRI:    &kit.CRIOptions{Pause: n.pause.Ref, Images: o.images},
	})
	n.cri = must[*kit.CRI](t)(kit.DialCRI(n.containerd))
	t.Cleanup(func() { n.cri.Close() })
	return n
}

// stopRegistry takes the node offline. Doing it twice is no error.
func (n *node) stopRegistry() error {
	if n.registry == nil {
		return nil
	}
	r := n.registry
	n.registry = nil
	return r.Close()
}

func (n *node) push(t testing.TB, name string, img kit.Image) kit.Pushed {
	t.Helper()
	return must[kit.Pushed](t)(kit.Push(t.Context(), n.registry, name, img))
}

// restart restarts containerd, or starts it when it was killed, and waits for the
// CRI plugin.
func (n *node) restart(t testing.TB) {
	t.Helper()
	if n.containerd.Running() {
		check(t, n.containerd.Stop())
	}
	n.started = len(must[string](t)(n.containerd.Log()))
	check(t, n.containerd.Start(t.Context()))
	check(t, n.cri.Redial(t.Context()))
}

// client returns a client of containerd in the CRI's namespace, and its context.
func (n *node) client(t testing.TB) (context.Context, *client.Client) {
	t.Helper()
	cl := must[*client.Client](t)(client.New(n.containerd.Address, client.WithDefaultNamespace(k8s)))
	t.Cleanup(func() { cl.Close() })
	return namespaces.WithNamespace(t.Context(), k8s), cl
}

// ctr runs ctr in the CRI's namespace.
func (n *node) ctr(t testing.TB, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	return n.containerd.Ctr(ctx, append([]string{"--namespace", k8s}, args...)...)
}

// backend returns the daemon's own names of an image's committed snapshots, lowest
// first. Of a layer that is there twice it is the later: containerd has forgotten
// the other, and not collected it yet.
func (n *node) backend(t testing.TB, img kit.Pushed) []string {
	t.Helper()
	sn := must[snapshots.Snapshotter](t)(n.daemon.Snapshotter())
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

package images

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"google.golang.org/grpc"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// node is a node with the CRI plugin, whose daemon drops nothing by itself.
type node struct {
	*kit.Node
	dir   string    // scratch directory, not on the disk
	base  kit.Layer // of all images: the program of their containers
	pause kit.Pushed
}

// nodeOptions change what newNodeWith starts.
type nodeOptions struct {
	fs      string                      // ext4 unless set
	heal    string                      // keys of the daemon's [heal]; no source but the content store unless set
	between grpc.UnaryServerInterceptor // what stands between containerd and the daemon
}

func newNode(t *testing.T) *node {
	t.Helper()
	return newNodeWith(t, nodeOptions{})
}

func newNodeWith(t *testing.T, o nodeOptions) *node {
	t.Helper()
	dir := scratch(t)
	r := must[*kit.Registry](t)(kit.StartRegistry(filepath.Join(dir, "registry")))
	runnable := must[kit.Image](t)(kit.Runnable(t.Context()))
	n := &node{dir: dir, base: runnable.Layers[1]}
	n.pause = must[kit.Pushed](t)(kit.Push(t.Context(), r, "pause", n.pauseImage()))
	config := fmt.Sprintf("[containerd]\naddress = '%s'\ndrop_images = false\n", filepath.Join(dir, "cd", "containerd.sock"))
	if o.heal != "" {
		config += "[heal]\n" + o.heal
	}
	n.Node = kittest.NewNode(t, kit.NodeOptions{
		Dir: dir, Registry: r, Heals: true, Disk: kit.DiskOptions{FS: o.fs},
		Daemon:     kit.DaemonOptions{Config: config},
		Containerd: kit.ContainerdOptions{CRI: &kit.CRIOptions{Pause: n.pause.Ref}},
	})
	if o.between != nil {
		address := filepath.Join(filepath.Dir(n.Daemon.Address), "between.sock")
		f := must[*kit.Forwarder](t)(kit.StartForwarder(address, n.Daemon.Address, o.between))
		t.Cleanup(func() {
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		})
		n.Through(address)
	}
	kittest.Start(t, n.Node)
	check(t, n.CRI.Pull(t.Context(), n.pause.Ref))
	return n
}

// pauseImage is the image of all sandboxes.
func (n *node) pauseImage() kit.Image {
	return kit.Image{
		Cmd:    []string{"/bin/guest", "wait"},
		Layers: []kit.Layer{kit.NewLayer(kit.Gzip, kit.Dir("proc", 0o555), kit.Dir("sys", 0o555), kit.Dir("dev", 0o755), kit.File("only/in/pause", 0o644, "pause\n")), n.base},
	}
}

// push pushes an image with a layer of its own on the base.
func (n *node) push(t *testing.T, name string) kit.Pushed {
	t.Helper()
	return must[kit.Pushed](t)(n.Push(t.Context(), name, kit.Image{
		Cmd: []string{"/bin/guest", "wait"},
		Layers: []kit.Layer{n.base, kit.NewLayer(kit.Gzip, kit.Dir("proc", 0o555), kit.Dir("sys", 0o555), kit.Dir("dev", 0o755), kit.Dir("own", 0o755),
			kit.File("own/name", 0o644, name+"\n"), kit.File("own/spare", 0o644, strings.Repeat(name, 1000)))},
	}))
}

// pull is push, and a pull as the kubelet does it.
func (n *node) pull(t *testing.T, name string) kit.Pushed {
	t.Helper()
	img := n.push(t, name)
	check(t, n.CRI.Pull(t.Context(), img.Ref))
	return img
}

// result is what check --images and repair --images print of an image.
type result struct {
	Image, Namespace, Platform, Verdict, Reason string

	Names  []string
	Layers []struct {
		State, Finding, Flaw, Source string
		ChainID                      string `json:"chain_id"`
	}
	Fetch *struct {
		Bytes int64
		From  []string
	}
	Holders []struct {
		Text   string
		Exited bool
	}
	Plan          []struct{ Action, Text string }
	Blocked, Done string
	Dropped       bool
}

// actions are the steps of a plan.
func (r result) actions() (all []string) {
	for _, s := range r.Plan {
		all = append(all, s.Action)
	}
	return all
}

type results []result

// of returns the result of an image in the CRI's namespace.
func (all results) of(t *testing.T, img kit.Pushed) result {
	t.Helper()
	i := slices.IndexFunc(all, func(r result) bool { return r.Image == img.Ref && r.Namespace == kit.CRINamespace })
	if i < 0 {
		t.Fatalf("there is no result of %s in %v", img.Ref, all)
	}
	return all[i]
}

// images runs check --images or repair --images.
func (n *node) images(t *testing.T, verb string, args ...string) (all results, status int) {
	t.Helper()
	stdout, stderr, status := kittest.Verb(t, n.Daemon, append([]string{verb, "--images", "--json"}, args...)...)
	if err := json.Unmarshal([]byte(stdout), &all); err != nil {
		t.Fatalf("%s --images %q: status %d: %v: %s%s", verb, args, status, err, stdout, stderr)
	}
	return all, status
}

// row is the daemon's row of a layer.
func (n *node) row(t *testing.T, img kit.Pushed, layer int) kit.Row {
	t.Helper()
	rows := kittest.Inspect(t, n.Daemon).Snapshots
	for _, r := range slices.Backward(rows) {
		if strings.HasPrefix(r.Name, kit.CRINamespace+"/") && strings.HasSuffix(r.Name, "/"+img.ChainIDs[layer].String()) {
			return r
		}
	}
	t.Fatalf("there is no row of layer %d of %s", layer, img.Ref)
	return kit.Row{}
}

// file is a file of a layer on disk.
func (n *node) file(t *testing.T, img kit.Pushed, layer int, name string) string {
	t.Helper()
	return filepath.Join(n.Daemon.LayerDir(n.row(t, img, layer).ID), name)
}

// trees are the fingerprints of an image's layers.
func (n *node) trees(t *testing.T, img kit.Pushed) (all []kit.Tree) {
	t.Helper()
	for i := range img.ChainIDs {
		all = append(all, must[kit.Tree](t)(kit.FingerprintLayer(n.file(t, img, i, "."), img)))
	}
	return all
}

// runs fails the test unless a container of an image can be created, and shows its own layer.
func (n *node) runs(t *testing.T, p *kit.Pod, img kit.Pushed) {
	t.Helper()
	id, err := p.Create(t.Context(), img.Ref, "/bin/guest", "cat", "/own/name")
	if err != nil {
		t.Errorf("create a container of %s: %v", img.Ref, err)
		return
	}
	check(t, p.Start(t.Context(), id))
	if code := must[int32](t)(p.Wait(t.Context(), id)); code != 0 {
		t.Errorf("a container of %s has ended with %d", img.Ref, code)
	}
	check(t, p.RemoveContainer(t.Context(), id))
}

// lose makes the daemon forget a layer that containerd has on record.
func (n *node) lose(t *testing.T, img kit.Pushed, layer int) {
	t.Helper()
	sn := must[snapshots.Snapshotter](t)(n.Daemon.Snapshotter())
	defer sn.Close()
	name := n.row(t, img, layer).Name
	// The snapshot of a container that was removed is there until containerd collects it.
	kittest.WaitFor(t, time.Minute, func() error { return sn.Remove(t.Context(), name) })
	check(t, sn.(snapshots.Cleaner).Cleanup(context.Background()))
}

// rewrite changes a file and keeps its size and its time.
func rewrite(t *testing.T, file string) {
	t.Helper()
	st := must[os.FileInfo](t)(os.Stat(file))
	body := must[[]byte](t)(os.ReadFile(file))
	for i := range body {
		body[i] ^= 0x20
	}
	check(t, os.WriteFile(file, body, st.Mode()))
	check(t, os.Chtimes(file, st.ModTime(), st.ModTime()))
}

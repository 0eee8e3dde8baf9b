package damage

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// node is a node with the image pulled through the daemon, and, when it is in use,
// a container that runs on it.
type node struct {
	*kit.Node
	image     kit.Pushed
	ids       map[string]uint64   // directory numbers by layer name
	trees     map[string]kit.Tree // fresh unpackings by layer name
	container *container
}

// newNodeInUse is newNode with a container that runs on the image.
func newNodeInUse(t *testing.T, fileSystem string) *node {
	t.Helper()
	n := newNode(t, fileSystem)
	n.container = n.run(t, "lasting")
	return n
}

func newNode(t *testing.T, fileSystem string) *node {
	t.Helper()
	n := newNodeWith(t, fileSystem, must[kit.Pushed](t)(image()), "")
	n.learn(t)
	return n
}

// newNodeWith is a node with another image, or another configuration of the
// daemon.
func newNodeWith(t *testing.T, fileSystem string, image kit.Pushed, config string) *node {
	t.Helper()
	// The daemon does not know containerd's socket: where a blob is bad, it would have
	// containerd drop the image, and nothing would be left to verify.
	n := &node{image: image, Node: kittest.StartNode(t, kit.NodeOptions{
		Disk: kit.DiskOptions{FS: fileSystem}, Heals: true, Daemon: kit.DaemonOptions{Config: config},
	})}
	kittest.Pull(t, n.Node, "durable", n.image.Ref)
	return n
}

// blob is the file of a layer's blob.
func (n *node) blob(layer string) string {
	return n.Blob(n.image.Layers[slices.Index(layerNames, layer)].Digest)
}

// ctr runs ctr and fails the test when it fails.
func (n *node) ctr(t *testing.T, args ...string) string {
	t.Helper()
	return kittest.Ctr(t, n.Node, args...)
}

// learn finds the directories of the layers, and keeps a copy and a fingerprint
// of each: the result of a fresh unpacking.
func (n *node) learn(t *testing.T) {
	t.Helper()
	n.ids, n.trees = map[string]uint64{}, map[string]kit.Tree{}
	results := n.check(t, 0)
	for i, layer := range layerNames {
		at := slices.IndexFunc(results, func(r kit.Verdict) bool { return r.ChainID == n.image.ChainIDs[i].String() })
		if at < 0 {
			t.Fatalf("no snapshot of layer %s in %+v", layer, results)
		}
		n.ids[layer] = results[at].ID
		n.trees[layer] = n.tree(t, layer)
		copyTree(t, n.dir(layer), n.pristine(layer))
	}
}

// dir is the directory of a layer's snapshot; root is the layer itself.
func (n *node) dir(layer string) string {
	return n.Daemon.SnapshotDir(n.ids[layer])
}

func (n *node) root(layer string) string     { return filepath.Join(n.dir(layer), "fs") }
func (n *node) pristine(layer string) string { return n.Path("pristine", layer) }

// tree is the fingerprint of a layer.
func (n *node) tree(t *testing.T, layer string) kit.Tree {
	t.Helper()
	return must[kit.Tree](t)(n.tryTree(layer))
}

func (n *node) tryTree(layer string) (kit.Tree, error) {
	return kit.FingerprintLayer(n.root(layer), n.image)
}

// whole fails unless every layer is what a fresh unpacking of it is.
func (n *node) whole(t *testing.T) {
	t.Helper()
	for _, layer := range layerNames {
		if d := kit.Diff(n.trees[layer], n.tree(t, layer), 5); d != "" {
			t.Errorf("layer %s is not whole:\n%s", layer, d)
		}
	}
}

// digested waits until there are content digests of all layers. Before, a
// content damage may be taken for what was committed.
func (n *node) digested(t *testing.T) {
	t.Helper()
	waitDigested(t, n.Daemon, len(layerNames))
}

// copyTree copies a directory with all its attributes.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	check(t, os.MkdirAll(filepath.Dir(to), 0o700))
	if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
		t.Fatalf("copy %s to %s: %v: %s", from, to, err, out)
	}
}

// putBack undoes a damage by hand, in place, so that the container's mount sees
// nothing of it: the directory of the damage comes from the copy.
func (n *node) putBack(t *testing.T, layer string, d *damage) {
	t.Helper()
	if d.has != nil {
		own := filepath.Join(n.root(layer), d.dir(layer))
		check(t, os.RemoveAll(own))
		copyTree(t, filepath.Join(n.pristine(layer), "fs", d.dir(layer)), own)
	}
	for _, name := range []string{layer, "."} {
		check(t, sameAttributes(filepath.Join(n.pristine(layer), "fs", name), filepath.Join(n.root(layer), name)))
	}
}

// sameAttributes gives a directory the owner, mode and time of another.
func sameAttributes(from, to string) error {
	var st unix.Stat_t
	if err := unix.Lstat(from, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: from, Err: err}
	}
	err := errors.Join(os.Lchown(to, int(st.Uid), int(st.Gid)), unix.Chmod(to, st.Mode&0o7777),
		unix.UtimesNanoAt(unix.AT_FDCWD, to, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW))
	if err != nil {
		return fmt.Errorf("attributes of %s: %w", to, err)
	}
	return nil
}

// remove removes a directory in which the daemon may be writing content digests.
func (n *node) remove(t *testing.T, dir string) {
	t.Helper()
	n.quietly(t, func() error { return os.RemoveAll(dir) })
}

// quietly does something to layers while the daemon, if it runs, stands still.
func (n *node) quietly(t *testing.T, do func() error) {
	t.Helper()
	if n.Daemon.Running() {
		check(t, n.Daemon.While(do))
	} else {
		check(t, do())
	}
}

// putBackLayer brings the whole directory of a layer back.
func (n *node) putBackLayer(t *testing.T, layer string) {
	t.Helper()
	n.remove(t, n.dir(layer))
	copyTree(t, n.pristine(layer), n.dir(layer))
}

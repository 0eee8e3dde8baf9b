package damage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// node is a machine: a disk with a daemon and a containerd on it, the image
// pulled through both, and a container that runs on it.
type node struct {
	disk       *kit.Disk
	daemon     *kit.Daemon
	containerd *kit.Containerd
	image      kit.Pushed
	ids        map[string]uint64   // directory numbers by layer name
	trees      map[string]kit.Tree // fresh unpackings by layer name
	container  *container
}

func newNode(t *testing.T, fs string) *node {
	t.Helper()
	n := &node{disk: newDisk(t, fs), image: must[kit.Pushed](t)(image())}
	n.daemon = startDaemon(t, n.disk)
	n.containerd = must[*kit.Containerd](t)(kit.StartContainerd(t.Context(), kit.ContainerdOptions{
		Binaries: must[kit.Binaries](t)(binaries()), Dir: n.disk.Path("containerd"), RunDir: scratch(t), Daemon: n.daemon,
	}))
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(n.containerd.LogTail(3000))
		}
		if err := n.containerd.Stop(); err != nil {
			t.Error(err)
		}
	})
	n.ctr(t, "image", "pull", "--plain-http", "--snapshotter", "durable", n.image.Ref)
	n.learn(t)
	n.container = n.run(t, "lasting")
	return n
}

// ctr runs ctr and fails the test when it fails.
func (n *node) ctr(t *testing.T, args ...string) string {
	t.Helper()
	out, err := n.tryCtr(t.Context(), args...)
	check(t, err)
	return out
}

// tryCtr gives ctr time for the slowest answer, so that a hang shows up as this
// call and not as a time-out of the whole run.
func (n *node) tryCtr(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return n.containerd.Ctr(ctx, args...)
}

// learn finds the directories of the layers, and keeps a copy and a fingerprint
// of each: what a fresh unpacking looks like.
func (n *node) learn(t *testing.T) {
	t.Helper()
	n.ids, n.trees = map[string]uint64{}, map[string]kit.Tree{}
	results := n.check(t, 0)
	for i, layer := range layerNames {
		at := slices.IndexFunc(results, func(r result) bool { return r.ChainID == n.image.ChainIDs[i].String() })
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
	return filepath.Join(n.daemon.Root, "snapshots", strconv.FormatUint(n.ids[layer], 10))
}

func (n *node) root(layer string) string     { return filepath.Join(n.dir(layer), "fs") }
func (n *node) pristine(layer string) string { return n.disk.Path("pristine", layer) }

// tree is the fingerprint of a layer, but for what depends on the time of the
// unpacking.
func (n *node) tree(t *testing.T, layer string) kit.Tree {
	t.Helper()
	tree := must[kit.Tree](t)(kit.Fingerprint(n.root(layer)))
	tree.Untime(n.image.Untimed...)
	return tree
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

// putBackLayer brings the whole directory of a layer back.
func (n *node) putBackLayer(t *testing.T, layer string) {
	t.Helper()
	check(t, os.RemoveAll(n.dir(layer)))
	copyTree(t, n.pristine(layer), n.dir(layer))
}

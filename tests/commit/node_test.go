package commit

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	bolt "go.etcd.io/bbolt"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// node is a containerd with a registry, and a place for daemons: one after
// another, each with its own environment, at the same address and root.
type node struct {
	dir, run   string // of the daemons
	daemon     *kit.Daemon
	containerd *kit.Containerd
	registry   *kit.Registry
	client     *client.Client
	trees      map[string]kit.Tree // what a view of a chain ID shows under the built-in overlayfs
}

// newNode starts containerd and the registry; dir is where daemons have their
// root.
func newNode(t *testing.T, dir string) *node {
	t.Helper()
	n := &node{dir: dir, run: must[string](t)(os.MkdirTemp("", "node")), trees: map[string]kit.Tree{}}
	t.Cleanup(func() { os.RemoveAll(n.run) })
	n.registry = must[*kit.Registry](t)(kit.StartRegistry(t.TempDir()))
	t.Cleanup(func() {
		if err := n.registry.Close(); err != nil {
			t.Error(err)
		}
	})
	n.daemon = must[*kit.Daemon](t)(kit.NewDaemon(kit.DaemonOptions{Dir: n.dir, RunDir: n.run}))
	n.containerd = must[*kit.Containerd](t)(kit.StartContainerd(t.Context(), kit.ContainerdOptions{
		Binaries: must[kit.Binaries](t)(binaries()), Dir: t.TempDir(), RunDir: filepath.Join(n.run, "containerd"), Daemon: n.daemon,
	}))
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(n.containerd.LogTail(4000))
		}
		if err := n.containerd.Stop(); err != nil {
			t.Error(err)
		}
	})
	n.client = must[*client.Client](t)(n.containerd.Client())
	t.Cleanup(func() { n.client.Close() })
	return n
}

// next makes the daemon that Start starts from now on.
func (n *node) next(t *testing.T, binary string, env ...string) *kit.Daemon {
	t.Helper()
	n.daemon = newDaemon(t, kit.DaemonOptions{Binary: binary, Dir: n.dir, RunDir: n.run, Env: env})
	return n.daemon
}

// push builds an image and learns from the built-in overlayfs what it must look
// like.
func (n *node) push(t *testing.T, name string, image kit.Image) kit.Pushed {
	t.Helper()
	p := must[kit.Pushed](t)(kit.Push(t.Context(), n.registry, name, image))
	check(t, n.pullWith(t, "overlayfs", p))
	for _, id := range p.ChainIDs {
		n.trees[id.String()] = n.tree(t, "overlayfs", p, id.String())
	}
	return p
}

func (n *node) pullWith(t *testing.T, snapshotter string, p kit.Pushed) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := n.containerd.Ctr(ctx, "image", "pull", "--plain-http", "--snapshotter", snapshotter, p.Ref)
	return err
}

func (n *node) pull(t *testing.T, p kit.Pushed) error {
	t.Helper()
	return n.pullWith(t, "durable", p)
}

// tree mounts a view of a chain ID, as a container would, and reads all of it.
func (n *node) tree(t *testing.T, snapshotter string, p kit.Pushed, chainID string) (tree kit.Tree) {
	t.Helper()
	// The lease keeps containerd's garbage collection from the view.
	ctx, release, err := n.client.WithLease(t.Context())
	check(t, err)
	sn := n.client.SnapshotService(snapshotter)
	key := fmt.Sprintf("view-%d", time.Now().UnixNano())
	m := must[mounts](t)(sn.View(ctx, key, chainID))
	check(t, mount.WithTempMount(ctx, m, func(dir string) (err error) {
		tree, err = kit.Fingerprint(dir)
		return err
	}))
	check(t, sn.Remove(ctx, key))
	check(t, release(ctx))
	tree.Untime(p.Untimed...)
	return tree
}

// whole checks every layer of an image that containerd believes in.
func (n *node) whole(t *testing.T, p kit.Pushed, names map[string]string) {
	t.Helper()
	sn := connect(t, n.daemon)
	for _, id := range p.ChainIDs {
		name, ok := names[id.String()]
		if !ok {
			continue
		}
		if info, err := sn.Stat(t.Context(), name); err != nil || info.Kind != snapshots.KindCommitted {
			t.Errorf("I1: stat %s: %v, %v, want it committed", name, info.Kind, err)
			continue
		}
		if d := kit.Diff(n.trees[id.String()], n.tree(t, "durable", p, id.String()), 8); d != "" {
			t.Errorf("I1: %s is not whole:\n%s", name, d)
		}
	}
}

// believed reads from containerd's own database which layers it was told are
// committed: names in the daemon, by chain ID.
func (n *node) believed(t *testing.T) map[string]string {
	t.Helper()
	// containerd has the file locked; a copy of a file that nobody writes at the
	// moment is as good.
	path := filepath.Join(t.TempDir(), "meta.db")
	check(t, os.WriteFile(path, must[[]byte](t)(os.ReadFile(filepath.Join(n.containerd.Root, "io.containerd.metadata.v1.bolt/meta.db"))), 0o600))
	db := must[*bolt.DB](t)(bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true}))
	defer db.Close()
	names := map[string]string{}
	check(t, db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte("v1"))
		for _, name := range []string{n.containerd.Namespace, "snapshots", "durable"} {
			if b = b.Bucket([]byte(name)); b == nil {
				return nil // nothing was ever prepared
			}
		}
		return b.ForEachBucket(func(key []byte) error {
			if strings.HasPrefix(string(key), "sha256:") {
				names[string(key)] = string(b.Bucket(key).Get([]byte("name")))
			}
			return nil
		})
	}))
	return names
}

// connected waits until containerd, which backs off for up to 3 s, has found
// the new daemon.
func (n *node) connected(t *testing.T) {
	t.Helper()
	sn := n.client.SnapshotService("durable")
	waitFor(t, 30*time.Second, func() error {
		_, err := sn.Prepare(t.Context(), "probe", "no such parent")
		if err != nil && strings.Contains(err.Error(), "does not exist") {
			err = sn.(snapshots.Cleaner).Cleanup(t.Context())
		}
		return err
	})
}

// remove removes an image and has containerd collect its garbage.
func (n *node) remove(t *testing.T, p kit.Pushed) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := n.containerd.Ctr(ctx, "image", "rm", "--sync", p.Ref)
	return err
}

// only checks that the daemon has nothing but the layers of the given images
// any more, and no directory but theirs.
func (n *node) only(t *testing.T, images ...kit.Pushed) {
	t.Helper()
	want := map[string]bool{}
	for _, p := range images {
		for _, id := range p.ChainIDs {
			want[id.String()] = true
		}
	}
	waitFor(t, 20*time.Second, func() error {
		rows := inspect(t, n.daemon).Snapshots
		for _, r := range rows {
			if !want[r.Name[strings.LastIndex(r.Name, "/")+1:]] {
				return fmt.Errorf("containerd's garbage collection left %s, %s", r.Kind, r.Name)
			}
		}
		for _, dir := range []string{"snapshots", "removing"} {
			if names := list(t, n.daemon.Root, dir); dir == "removing" && len(names) > 0 || len(names) > len(rows) {
				return fmt.Errorf("directories left in %s: %v, rows: %v", dir, names, rows)
			}
		}
		return nil
	})
	noOrphans(t, n.daemon)
}

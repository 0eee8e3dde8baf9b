package commit

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// node is a node with a place for daemons: one after another, each with its own
// environment, at the same address and root. containerd is not on their disk.
type node struct {
	*kit.Node
	dir, run string // of the daemons
	client   *client.Client
	pullers  map[string]*kit.Puller // by snapshotter
	trees    map[string]kit.Tree    // what a view of a chain ID shows under the built-in overlayfs
	heals    bool                   // daemons know containerd's content store
}

// newNode starts containerd and the registry; dir is where daemons have their
// root.
func newNode(t *testing.T, dir string, differ ...string) *node {
	t.Helper()
	n := &node{dir: dir, run: kittest.Scratch(t), pullers: map[string]*kit.Puller{}, trees: map[string]kit.Tree{}}
	n.Node = kittest.NewNode(t, kit.NodeOptions{
		Volume: dir, Registry: must[*kit.Registry](t)(kit.StartRegistry(t.TempDir())),
		Daemon:     kit.DaemonOptions{Dir: n.dir, RunDir: n.run},
		Containerd: kit.ContainerdOptions{Dir: t.TempDir(), RunDir: filepath.Join(n.run, "containerd"), Differ: differ},
	})
	kittest.StartContainerd(t, n.Node)
	n.client = must[*client.Client](t)(n.Containerd.Client())
	t.Cleanup(func() { n.client.Close() })
	for _, name := range []string{"durable", "overlayfs"} {
		n.pullers[name] = &kit.Puller{Client: n.client, Snapshotter: name}
	}
	return n
}

// next makes the daemon that Start starts from now on.
func (n *node) next(t *testing.T, binary string, env ...string) *kit.Daemon {
	t.Helper()
	// What is lost must be seen: mostly there is nothing to heal it with.
	content := ""
	if n.heals {
		content = n.ContentRoot()
	}
	n.Daemon = newDaemon(t, kit.DaemonOptions{
		Binary: binary, Dir: n.dir, RunDir: n.run, Env: env, Config: fmt.Sprintf("content_root = %q\n", content),
	})
	return n.Daemon
}

// push builds an image and learns from the built-in overlayfs what it must
// contain.
func (n *node) push(t *testing.T, name string, img kit.Image) kit.Pushed {
	t.Helper()
	p := must[kit.Pushed](t)(n.Push(t.Context(), name, img))
	check(t, n.pull(t.Context(), "overlayfs", p))
	for _, id := range p.ChainIDs {
		n.trees[id.String()] = n.tree(t, "overlayfs", p, id.String())
	}
	return p
}

// pull pulls an image by the transfer service, as ctr does.
func (n *node) pull(ctx context.Context, snapshotter string, p kit.Pushed) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	return n.pullers[snapshotter].Pull(ctx, kit.ByTransfer, n.Namespace(), p.Ref)
}

// tree mounts a view of a chain ID, as a container would, and reads all of it.
func (n *node) tree(t *testing.T, snapshotter string, p kit.Pushed, chainID string) kit.Tree {
	t.Helper()
	tree, _, err := n.pullers[snapshotter].View(t.Context(), n.Namespace(), chainID)
	check(t, err)
	tree.Untime(p.Untimed...)
	return tree
}

// whole checks every layer of an image that containerd has recorded as committed.
func (n *node) whole(t *testing.T, p kit.Pushed, names map[string]string) {
	t.Helper()
	sn := kittest.Connect(t, n.Daemon)
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

// recorded reads from containerd's own database which layers it has recorded as
// committed: names in the daemon, by chain ID. A Stat of containerd
// would call the daemon.
func (n *node) recorded(t *testing.T) map[string]string {
	t.Helper()
	names := map[string]string{}
	check(t, viewCopy(t, filepath.Join(n.Containerd.Root, "io.containerd.metadata.v1.bolt/meta.db"), func(_ *bolt.DB, tx *bolt.Tx) error {
		b := tx.Bucket([]byte("v1"))
		for _, name := range []string{n.Containerd.Namespace, "snapshots", "durable"} {
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

// viewCopy reads a copy of a database: the process that uses it has it locked. A
// copy of a file that is written to meanwhile may make no sense; one that twice
// is the same was not.
func viewCopy(t *testing.T, database string, fn func(*bolt.DB, *bolt.Tx) error) error {
	t.Helper()
	var content []byte
	waitFor(t, 10*time.Second, func() error {
		before := content
		content = must[[]byte](t)(os.ReadFile(database))
		if !bytes.Equal(before, content) {
			return fmt.Errorf("%s does not come to rest", database)
		}
		return nil
	})
	path := filepath.Join(t.TempDir(), filepath.Base(database))
	check(t, os.WriteFile(path, content, 0o600))
	db := must[*bolt.DB](t)(bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, PreLoadFreelist: true}))
	defer db.Close()
	return db.View(func(tx *bolt.Tx) error { return fn(db, tx) })
}

// connected waits until containerd, which backs off for up to 3 s, has found the
// new daemon. It calls Stat of it for every snapshot that it lists.
func (n *node) connected(t *testing.T) {
	t.Helper()
	waitFor(t, 30*time.Second, func() error {
		return n.client.SnapshotService("durable").Walk(t.Context(), func(context.Context, snapshots.Info) error { return nil })
	})
}

// unavailable repeats what containerd cannot do while it backs off, until it
// ends otherwise or stop is closed.
func unavailable(t *testing.T, stop <-chan struct{}, do func() error) error {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; {
		err := do()
		if !errdefs.IsUnavailable(err) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-stop:
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// remove removes an image and has containerd collect its garbage.
func (n *node) remove(ctx context.Context, p kit.Pushed) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	return n.client.ImageService().Delete(ctx, p.Ref, images.SynchronousDelete())
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
		for _, r := range kittest.Inspect(t, n.Daemon).Snapshots {
			if !want[r.Name[strings.LastIndex(r.Name, "/")+1:]] {
				return fmt.Errorf("containerd's garbage collection left %s, %s", r.Kind, r.Name)
			}
		}
		return orphans(t, n.Daemon)
	})
}

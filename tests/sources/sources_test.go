package sources

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// limit is how long anything may take that no test waits for: the machine may be slow.
const limit = 4 * time.Minute

// hurt is the layer that is damaged: others stand above and below it.
const hurt = 1

// node has an image, and its archive beside the directory that the daemon looks into.
type node struct {
	*kit.Node
	image     kit.Pushed
	archives  string // directory
	archive   string // file, to be linked into it
	id        uint64 // of the layer
	fresh     kit.Tree
	images    string // names
	container string // "" without one
	pid       string
	seen      int // length of the daemon's log when a case began
}

func newNode(t *testing.T, container bool) *node {
	t.Helper()
	dir := kittest.Scratch(t)
	r := must[*kit.Registry](t)(kit.StartRegistry(filepath.Join(dir, "registry")))
	n := &node{archives: filepath.Join(dir, "images"), archive: filepath.Join(dir, "image.tar")}
	n.Node = kittest.StartNode(t, kit.NodeOptions{
		Registry: r, Heals: true, Notifies: true,
		Daemon: kit.DaemonOptions{Config: fmt.Sprintf("[heal]\narchives = ['%s']\nregistry = true\nhosts = ''\n", n.archives)},
	})
	n.image = must[kit.Pushed](t)(n.Push(t.Context(), "app", must[kit.Image](t)(kit.Runnable(t.Context()))))
	kittest.Pull(t, n.Node, "durable", n.image.Ref)
	n.ctr(t, "image", "export", n.archive, n.image.Ref)
	check(t, os.Mkdir(n.archives, 0o755))
	for _, v := range must[[]kit.Verdict](t)(n.verdicts(t, "check")) {
		if v.ChainID == n.image.ChainIDs[hurt].String() {
			n.id = v.ID
		}
	}
	n.fresh = must[kit.Tree](t)(n.tree())
	if container {
		n.container = fmt.Sprintf("lasting-%d", n.Number)
		n.ctr(t, "run", "-d", "--snapshotter", "durable", n.image.Ref, n.container, "/bin/guest", "wait")
		t.Cleanup(func() { // it holds the disk
			for _, args := range [][]string{{"task", "rm", "--force", n.container}, {"container", "rm", n.container}} {
				if _, err := n.Ctr(context.Background(), args...); err != nil {
					t.Error(err)
				}
			}
		})
		n.pid = n.task(t)
	}
	return n
}

// tree is the layer on disk. What has no entry in a tar has the time of the unpacking.
func (n *node) tree() (kit.Tree, error) {
	tree, err := kit.Fingerprint(n.Daemon.LayerDir(n.id))
	tree.Untime(append([]string{"."}, n.image.Untimed...)...)
	return tree, err
}

func (n *node) ctr(t *testing.T, args ...string) string {
	t.Helper()
	return kittest.Ctr(t, n.Node, args...)
}

func (n *node) verdicts(t *testing.T, args ...string) ([]kit.Verdict, error) {
	t.Helper()
	all, _, err := n.Daemon.Verdicts(t.Context(), args...)
	return all, err
}

// task is the line of the container in the list of tasks.
func (n *node) task(t *testing.T) string {
	t.Helper()
	for line := range strings.Lines(n.ctr(t, "task", "ls")) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == n.container {
			return line
		}
	}
	t.Fatalf("container %s has no task", n.container)
	return ""
}

// log is what the daemon has logged since the case began.
func (n *node) log(t *testing.T) string {
	t.Helper()
	return must[string](t)(n.Daemon.Log())[n.seen:]
}

// damage empties a file of the layer, and begins a case.
func (n *node) damage(t *testing.T) {
	t.Helper()
	n.seen, n.images = len(must[string](t)(n.Daemon.Log())), n.ctr(t, "image", "ls", "--quiet")
	var largest string
	for path, inode := range n.fresh {
		if inode.Mode.IsRegular() && (largest == "" || inode.Size > n.fresh[largest].Size) {
			largest = path
		}
	}
	if largest == "" {
		t.Fatal("the layer has no file")
	}
	check(t, os.Remove(filepath.Join(n.Daemon.LayerDir(n.id), largest)))
}

// repair is repair --apply of the layer, whatever comes of it.
func (n *node) repair(t *testing.T) kit.Verdict {
	t.Helper()
	all := must[[]kit.Verdict](t)(n.verdicts(t, "repair", "--apply"))
	for _, v := range all {
		if v.ID == n.id {
			return v
		}
	}
	t.Fatalf("repair reports %v", all)
	return kit.Verdict{}
}

// ready is an error unless the layer is as its fresh unpacking.
func (n *node) ready(t *testing.T) error {
	t.Helper()
	all, err := n.verdicts(t, "check")
	if err != nil {
		return err
	}
	for _, v := range all {
		if v.State != "ready" {
			return fmt.Errorf("%v", v)
		}
	}
	got, err := n.tree()
	if diff := kit.Diff(n.fresh, got, 5); err == nil && diff != "" {
		err = errors.New(diff)
	}
	return err
}

// has is an error unless containerd has a good blob after a collection.
func (n *node) has(t *testing.T, d digest.Digest) error {
	t.Helper()
	lease := strings.TrimSpace(n.ctr(t, "leases", "create"))
	n.ctr(t, "leases", "delete", "--sync", lease)
	if list := n.ctr(t, "content", "ls", "--quiet"); !strings.Contains(list, d.String()) {
		return fmt.Errorf("containerd does not list blob %s", d)
	}
	p, err := os.ReadFile(n.Blob(d))
	if err == nil && digest.FromBytes(p) != d {
		err = fmt.Errorf("blob %s has another content", d)
	}
	return err
}

// undisturbed fails unless the image and the container are what they were.
func (n *node) undisturbed(t *testing.T) {
	t.Helper()
	if list := n.ctr(t, "image", "ls", "--quiet"); list != n.images {
		t.Errorf("the images were %q and are %q", n.images, list)
	}
	if text := n.log(t); strings.Contains(text, "layer_dropped") || strings.Contains(text, "mending_stopped") {
		t.Errorf("something was dropped, or mending is stopped:\n%s", text)
	}
	if n.container != "" {
		if now := n.task(t); now != n.pid {
			t.Errorf("the task was %q and is %q", n.pid, now)
		}
	}
	waitFor(t, limit, func() error {
		list, err := n.Ctr(t.Context(), "leases", "ls", "--quiet")
		if err != nil {
			return err
		}
		for line := range strings.Lines(list) {
			if strings.TrimSpace(line) != "" {
				return fmt.Errorf("lease %q is left", line)
			}
		}
		return nil
	})
}

// losses are what befalls the own blob of the layer, and what leads to it.
var losses = []struct {
	name string
	do   func(t *testing.T, n *node)
}{
	{"blob gone", func(t *testing.T, n *node) { check(t, os.Remove(n.Blob(n.image.Layers[hurt].Digest))) }},
	{"blob corrupt", func(t *testing.T, n *node) {
		file := n.Blob(n.image.Layers[hurt].Digest)
		p := must[[]byte](t)(os.ReadFile(file))
		for i := len(p) / 2; i < len(p)/2+100 && i < len(p); i++ {
			p[i] ^= 0xff
		}
		check(t, os.WriteFile(file, p, 0o444))
	}},
	{"manifest and blob gone", func(t *testing.T, n *node) {
		check(t, os.Remove(n.Blob(n.image.Layers[hurt].Digest)))
		check(t, os.Remove(n.Blob(n.image.Manifest)))
	}},
}

// each runs a test without a container and with one, and in both for each loss. The manifest
// is put back after each.
func each(t *testing.T, prepare func(t *testing.T, n *node), test func(t *testing.T, n *node)) {
	for name, container := range map[string]bool{"no container": false, "running container": true} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, container)
			prepare(t, n)
			good := map[digest.Digest][]byte{}
			for _, d := range []digest.Digest{n.image.Manifest, n.image.Layers[hurt].Digest} {
				good[d] = must[[]byte](t)(os.ReadFile(n.Blob(d)))
			}
			for _, loss := range losses {
				t.Run(loss.name, func(t *testing.T) {
					loss.do(t, n)
					n.damage(t)
					test(t, n)
					n.undisturbed(t)
				})
				for d, p := range good {
					check(t, os.WriteFile(n.Blob(d), p, 0o444))
				}
			}
		})
	}
}

// TestOtherImage: the layer comes from the blob of another image that has the same tar, in
// another compression, on another base.
func TestOtherImage(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, n *node) {
		layer := must[kit.Image](t)(kit.Runnable(t.Context())).Layers[hurt]
		if layer.Compression = kit.Zstd; n.image.Layers[hurt].MediaType != "" && strings.Contains(n.image.Layers[hurt].MediaType, "zstd") {
			layer.Compression = kit.Gzip
		}
		other := must[kit.Pushed](t)(n.Push(t.Context(), "other", kit.Image{Layers: []kit.Layer{kit.NewLayer(kit.Gzip, kit.Dir("base", 0o755)), layer}}))
		if other.DiffIDs[1] != n.image.DiffIDs[hurt] || other.ChainIDs[1] == n.image.ChainIDs[hurt] {
			t.Fatalf("the layers are %v and %v", other.DiffIDs, n.image.DiffIDs)
		}
		n.ctr(t, "content", "fetch", "--plain-http", other.Ref)
	}, func(t *testing.T, n *node) {
		if v := n.repair(t); !v.Healed {
			t.Errorf("not healed: %v", v)
		}
		check(t, n.ready(t))
		if text := n.log(t); strings.Contains(text, "blob_fetched") || strings.Contains(text, "blob_put_back") {
			t.Errorf("it came from elsewhere:\n%s", text)
		}
	})
}

// TestArchive: the layer comes from an archive that containerd has exported, and containerd has
// its blob again.
func TestArchive(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, n *node) {
		check(t, n.GoOffline())
		check(t, os.Link(n.archive, filepath.Join(n.archives, "image.tar")))
	}, func(t *testing.T, n *node) {
		if v := n.repair(t); !v.Healed {
			t.Errorf("not healed: %v", v)
		}
		check(t, n.ready(t))
		waitFor(t, limit, func() error {
			if !strings.Contains(n.log(t), `"event":"blob_put_back"`) {
				return errors.New("the blob was not put back")
			}
			return nil
		})
		check(t, n.has(t, n.image.Layers[hurt].Digest))
	})
}

// TestRegistry: containerd fetches the blob, and what led to it, and the layer heals by
// itself after that.
func TestRegistry(t *testing.T) {
	t.Parallel()
	each(t, func(*testing.T, *node) {}, func(t *testing.T, n *node) {
		n.repair(t)
		waitFor(t, limit, func() error { return n.ready(t) })
		// A caller may have it healed as soon as the blob is there, before the fetch has ended.
		waitFor(t, limit, func() error {
			if !strings.Contains(n.log(t), `"event":"blob_fetched"`) {
				return errors.New("nothing was fetched")
			}
			return nil
		})
		for _, d := range []digest.Digest{n.image.Layers[hurt].Digest, n.image.Manifest} {
			check(t, n.has(t, d))
		}
	})
}

// TestAirGapped: without an archive, and with a registry that is down, the attempt ends at
// once and is logged once; a layer that a container holds stays, and is healed when an archive
// appears.
func TestAirGapped(t *testing.T) {
	t.Parallel()
	n := newNode(t, true)
	check(t, n.GoOffline())
	check(t, os.Remove(n.Blob(n.image.Layers[hurt].Digest)))
	n.damage(t)
	begun := time.Now()
	if v := n.repair(t); v.Healed || !strings.Contains(v.Reason, "there is no good blob of it") {
		t.Errorf("repair reports %v", v)
	}
	waitFor(t, limit, func() error {
		if text := n.log(t); !strings.Contains(text, `"event":"fetch_failed"`) || !strings.Contains(text, `"event":"notify_failed"`) {
			return errors.New("the attempt has not ended")
		}
		return nil
	})
	t.Logf("after %v", time.Since(begun))
	for range 3 {
		n.repair(t)
	}
	if count := strings.Count(n.log(t), `"event":"fetch_failed"`); count != 1 {
		t.Errorf("logged %d times:\n%s", count, n.log(t))
	}
	check(t, os.Link(n.archive, filepath.Join(n.archives, "image.tar")))
	if v := n.repair(t); !v.Healed {
		t.Errorf("not healed: %v", v)
	}
	check(t, n.ready(t))
	n.undisturbed(t)
}

// TestFetchedNameGoes: a repair, the daemon, or containerd has died between the end of a fetch
// and the deletion of the name under which containerd has recorded it. The daemon deletes it.
func TestFetchedNameGoes(t *testing.T) {
	t.Parallel()
	n := newNode(t, false)
	name := "durable-snapshotter.invalid/fetched@" + n.image.Manifest.String()
	before := n.ctr(t, "image", "ls", "--quiet")
	for _, c := range []struct {
		who string
		die func()
	}{
		{"repair", func() { n.ctr(t, "image", "tag", n.image.Ref, name) }},
		{"daemon", func() {
			check(t, n.Daemon.Kill())
			n.ctr(t, "image", "tag", n.image.Ref, name)
			check(t, n.Daemon.Start(t.Context()))
		}},
		{"containerd", func() {
			check(t, n.Daemon.Kill())
			n.ctr(t, "image", "tag", n.image.Ref, name)
			check(t, n.Containerd.Kill())
			check(t, n.Daemon.Start(t.Context()))
			check(t, n.StartContainerd(t.Context()))
		}},
	} {
		c.die()
		waitFor(t, limit, func() error {
			if list := n.ctr(t, "image", "ls", "--quiet"); list != before {
				return fmt.Errorf("%s: the images were %q and are %q", c.who, before, list)
			}
			return nil
		})
	}
}

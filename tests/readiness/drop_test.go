package readiness

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// repairer connects package repull to the node's containerd.
func (n *node) repairer(t testing.TB, opts ...grpc.DialOption) *repull.Containerd {
	t.Helper()
	c := must[*repull.Containerd](t)(repull.Connect(n.Containerd.Address, opts...))
	t.Cleanup(func() { c.Close() })
	return c
}

// layer is number i of an image's layers, in the CRI's namespace.
func layer(img kit.Pushed, i int) repull.Layer {
	return repull.Layer{Namespace: k8s, Snapshotter: "durable", ChainID: img.ChainIDs[i]}
}

// drop drops layer i of an image as the daemon does.
func (n *node) drop(t testing.TB, img kit.Pushed, i int) (repull.Dropped, error) {
	t.Helper()
	return n.dropWith(t, img, i, n.options(t))
}

func (n *node) options(t testing.TB) repull.Options {
	t.Helper()
	sn := must[snapshots.Snapshotter](t)(n.Daemon.Snapshotter())
	t.Cleanup(func() { sn.Close() })
	return repull.Options{Rows: sn, ContentRoot: n.ContentRoot()}
}

func (n *node) dropWith(t testing.TB, img kit.Pushed, i int, o repull.Options) (repull.Dropped, error) {
	t.Helper()
	ctx, cancel := within(t)
	defer cancel()
	return n.repairer(t).Drop(ctx, layer(img, i), o)
}

// damage makes the snapshotter report from now on that layer i of an image, and what
// stands on it in that image, is not whole. A later snapshot of the same layer is.
func (n *node) damage(t testing.TB, img kit.Pushed, i int) {
	t.Helper()
	n.between.answerWith(codes.FailedPrecondition, n.backend(t, img)[i:]...)
}

// usable fails the test unless an image can be pulled and run, and all its blobs
// match their digests.
func (n *node) usable(t testing.TB, p *pod, img kit.Pushed) {
	t.Helper()
	n.usableFrom(t, p, img, 0)
}

// usableFrom is usable where blobs of layers below number first may be missing.
func (n *node) usableFrom(t testing.TB, p *pod, img kit.Pushed, first int) {
	t.Helper()
	check(t, n.pull(t, img))
	if !n.present(t, img) {
		t.Errorf("after a pull of %s the CRI plugin does not know it", img.Ref)
	}
	check(t, p.run(t, img))
	for i, l := range img.Layers {
		body, err := os.ReadFile(n.Blob(l.Digest))
		if i < first && errors.Is(err, os.ErrNotExist) {
			continue
		}
		check(t, err)
		if got := digest.FromBytes(body); got != l.Digest {
			t.Errorf("blob %s has digest %s", l.Digest, got)
		}
	}
}

// Ways to break a blob on disk, by the words of package repull.
var breaks = map[string]func(string) error{
	"missing": os.Remove,
	"short":   func(file string) error { return os.Truncate(file, 100) },
	"corrupt": func(file string) error {
		return rewrite(file, func(b []byte) []byte {
			// One bit may be one that no decompressor reads.
			for i := range 16 {
				b[len(b)/2+i] ^= 0xff
			}
			return b
		})
	},
	"grown": func(file string) error {
		return rewrite(file, func(b []byte) []byte { return append(b, "more"...) })
	},
	"empty": func(file string) error { return os.Truncate(file, 0) },
}

// rewrite changes a file in place. Blobs are read-only, which does not stop root.
func rewrite(file string, change func([]byte) []byte) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return os.WriteFile(file, change(b), 0o444)
}

// TestDrop: whatever has become of the blob of a damaged layer, Drop makes the
// image unknown, and the next pull makes it whole. What was good is not fetched
// again. containerd was restarted before every second of them.
func TestDrop(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	check(t, n.pull(t, n.pause))
	p := must[*pod](t)(n.startPod(t))
	for i, flaw := range slices.Sorted(maps.Keys(breaks)) {
		spoil := breaks[flaw]
		restart := i%2 == 0
		t.Run(fmt.Sprintf("%s,restart=%v", flaw, restart), func(t *testing.T) {
			check(t, n.pull(t, n.app))
			check(t, p.run(t, n.app))
			n.damage(t, n.app, 1)
			good := []string{n.Blob(n.app.Layers[0].Digest), n.Blob(n.app.Layers[2].Digest)}
			before := inodes(t, good)
			lowest := n.backend(t, n.app)[0]
			bad := n.app.Layers[1]
			check(t, spoil(n.Blob(bad.Digest)))
			if restart {
				n.restart(t)
			}

			done := must[repull.Dropped](t)(n.drop(t, n.app, 1))
			want := []repull.Blob{{Digest: bad.Digest, Size: bad.Size, Flaw: strings.Replace(flaw, "empty", "short", 1)}}
			if !slices.Equal(done.Blobs, want) {
				t.Errorf("dropped blobs %v, want %v", done.Blobs, want)
			}
			// The tag, the digest, and the identifier of the config.
			if len(done.Images) != 3 {
				t.Errorf("dropped images %q", done.Images)
			}
			n.waitKnown(t, n.app, false)
			n.wantNoKeys(t, n.app, 1)
			if _, err := os.Lstat(n.Blob(bad.Digest)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the bad blob after Drop: %v", err)
			}
			if again := must[repull.Dropped](t)(n.drop(t, n.app, 1)); !again.Nothing() {
				t.Errorf("a second Drop: %v", again)
			}

			n.usable(t, p, n.app)
			if after := inodes(t, good); !slices.Equal(before, after) {
				t.Errorf("good blobs were fetched again: inodes %v, before %v", after, before)
			}
			if now := n.backend(t, n.app)[0]; now != lowest {
				t.Errorf("the good layer below is %s, was %s", now, lowest)
			}
			if again := must[repull.Dropped](t)(n.drop(t, n.app, 1)); !again.Nothing() {
				t.Errorf("Drop of a layer that is whole: %v", again)
			}
			check(t, p.run(t, n.app))
		})
	}
}

// wantNoKeys fails the test if containerd still has snapshots of an image, from
// layer first upwards. Who removed them is open: once the names of an image are
// deleted, it may be containerd's garbage collection.
func (n *node) wantNoKeys(t testing.TB, img kit.Pushed, first int) {
	t.Helper()
	ctx, cl := n.client(t)
	for _, id := range img.ChainIDs[first:] {
		if _, err := cl.SnapshotService("durable").Stat(ctx, id.String()); !errdefs.IsNotFound(err) {
			t.Errorf("snapshot %s after Drop: %v", id, err)
		}
	}
}

// TestDropDocuments: the same when the image's config or manifest is bad, too, so
// that nothing but containerd's records shows which layers the image has. The
// snapshotter's rows are not read either: they may have been lost.
func TestDropDocuments(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	check(t, n.pull(t, n.pause))
	p := must[*pod](t)(n.startPod(t))
	for _, document := range []string{"config", "manifest"} {
		for flaw, spoil := range breaks {
			t.Run(document+","+flaw, func(t *testing.T) {
				check(t, n.pull(t, n.app))
				n.damage(t, n.app, 0)
				d := n.app.Manifest
				if document == "config" {
					d = n.config(t, n.app)
				}
				check(t, spoil(n.Blob(d)))
				o := n.options(t)
				o.Rows = nil
				done := must[repull.Dropped](t)(n.dropWith(t, n.app, 0, o))
				n.wantNoKeys(t, n.app, 0)
				if len(done.Blobs) != 1 || done.Blobs[0].Digest != d {
					t.Errorf("dropped blobs %v, want %s", done.Blobs, d)
				}
				n.waitKnown(t, n.app, false)
				n.usable(t, p, n.app)
			})
		}
	}
}

// config is the digest of an image's config, which is its identifier in the CRI.
func (n *node) config(t testing.TB, img kit.Pushed) digest.Digest {
	t.Helper()
	ctx, cl := n.client(t)
	info, err := cl.ContentStore().Info(ctx, img.Manifest)
	check(t, err)
	return digest.Digest(info.Labels["containerd.io/gc.ref.content.config"])
}

func inodes(t testing.TB, files []string) (all []uint64) {
	t.Helper()
	for _, f := range files {
		all = append(all, must[os.FileInfo](t)(os.Stat(f)).Sys().(*syscall.Stat_t).Ino)
	}
	return all
}

// TestDropShared: images that have the damaged layer go together; one that shares
// only good layers below it stays as it is, snapshots included.
func TestDropShared(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	check(t, n.pull(t, n.pause))
	p := must[*pod](t)(n.startPod(t))
	base := must[kit.Image](t)(kit.Runnable(t.Context()))
	with := func(name string, layers ...kit.Layer) kit.Pushed {
		return n.push(t, name, kit.Image{Cmd: base.Cmd, Layers: layers})
	}
	other := kit.NewLayer(kit.Gzip, kit.Dir("etc", 0o755), kit.File("etc/motd", 0o644, "another third layer\n"))
	sibling := with("sibling", base.Layers[0], base.Layers[1], other)
	short := with("short", base.Layers[0], base.Layers[1])
	safe := with("safe", base.Layers[0], other, base.Layers[1])
	all := []kit.Pushed{n.app, sibling, short, safe}
	for _, img := range all {
		check(t, n.pull(t, img))
	}
	kept := n.backend(t, safe)
	n.between.answerWith(codes.FailedPrecondition, slices.Concat(n.backend(t, n.app)[1:], n.backend(t, sibling)[1:])...)
	check(t, os.Remove(n.Blob(n.app.Layers[1].Digest)))

	done := must[repull.Dropped](t)(n.drop(t, n.app, 1))
	if len(done.Images) != 9 {
		t.Errorf("dropped images %q", done.Images)
	}
	for _, img := range []kit.Pushed{n.app, sibling, short} {
		n.waitKnown(t, img, false)
		n.wantNoKeys(t, img, 1)
	}
	if !n.present(t, safe) {
		t.Error("an image without the damaged layer was dropped")
	}
	check(t, p.run(t, safe))
	if now := n.backend(t, safe); !slices.Equal(now, kept) {
		t.Errorf("snapshots of the image that stays: %q, were %q", now, kept)
	}
	for _, img := range all {
		n.usable(t, p, img)
	}
}

// TestDropElsewhere: a bad blob is bad in every namespace, because the file is one.
// An image of another namespace whose layers are whole keeps running.
func TestDropElsewhere(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	p := n.inUse(t)
	elsewhere := func(args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		return n.Containerd.Ctr(ctx, args...)
	}
	_, err := elsewhere("images", "pull", "--plain-http", "--snapshotter", "durable", n.app.Ref)
	check(t, err)
	n.damage(t, n.app, 1)
	bad := n.app.Layers[1].Digest
	check(t, breaks["corrupt"](n.Blob(bad)))

	must[repull.Dropped](t)(n.drop(t, n.app, 1))
	n.waitKnown(t, n.app, false)
	hello := func() {
		t.Helper()
		if out, err := elsewhere("run", "--rm", "--snapshotter", "durable", n.app.Ref, "once"); err != nil || out != "hello from the image\n" {
			t.Errorf("a container in the other namespace: %q, %v", out, err)
		}
	}
	hello()
	n.usable(t, p, n.app)
	_, err = elsewhere("images", "pull", "--plain-http", "--snapshotter", "durable", n.app.Ref)
	check(t, err)
	hello()
}

// TestDropOffline: without a registry, the image is gone after Drop, and Drop reports
// so.
func TestDropOffline(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	check(t, n.pull(t, n.pause))
	check(t, n.pull(t, n.app))
	n.damage(t, n.app, 1)
	check(t, os.Remove(n.Blob(n.app.Layers[1].Digest)))
	check(t, n.GoOffline())
	done := must[repull.Dropped](t)(n.drop(t, n.app, 1))
	if text := done.String(); !strings.Contains(text, "until the registry can be reached") || !strings.Contains(text, n.app.Ref) {
		t.Errorf("Drop reports %q", text)
	}
	n.waitKnown(t, n.app, false)
	n.restart(t)
	if n.present(t, n.app) {
		t.Error("the image is back after a restart")
	}
	if err := n.pull(t, n.app); err == nil {
		t.Error("a pull without a registry succeeded")
	}
}

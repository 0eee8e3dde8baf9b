package readiness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	containerdimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"

	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// keeps fails the test unless Drop of layer 1 of app is refused with a GoodBlobError
// and changes nothing in containerd.
func (n *node) keeps(t *testing.T, o repull.Options, words ...string) {
	t.Helper()
	before := n.records(t)
	done, err := n.dropWith(t, n.app, 1, o)
	var good *repull.GoodBlobError
	if !errors.As(err, &good) || !errdefs.IsFailedPrecondition(err) || !done.Nothing() {
		t.Fatalf("Drop of a layer with a good blob: %v, %v", done, err)
	}
	if good.Blob != n.app.Layers[1].Digest {
		t.Errorf("the good blob is %s, not the layer's", good.Blob)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not contain %q", err, w)
		}
	}
	if after := n.records(t); after != before {
		t.Errorf("Drop changed containerd's records to\n%s\nfrom\n%s", after, before)
	}
}

// TestDropGoodBlob: as long as containerd has a good blob of the layer, with what leads
// to it, nothing is dropped, whatever the snapshotter reports of its own verification.
func TestDropGoodBlob(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	check(t, n.pull(t, n.app))
	n.damage(t, n.app, 1)
	ctx, cl := n.client(t)
	cs := cl.ContentStore()
	bad := n.app.Layers[1].Digest

	t.Run("another content_root", func(t *testing.T) {
		o := n.options(t)
		o.ContentRoot = filepath.Join(scratch(t), "another")
		o.BlobsOfHeld = true
		n.keeps(t, o, fmt.Sprintf("content_root %q is not the content store", o.ContentRoot), fmt.Sprintf("set it to %q", n.ContentRoot()))
	})
	t.Run("the right content_root", func(t *testing.T) {
		n.keeps(t, n.options(t), "the layer can be healed from it")
	})
	t.Run("without rows", func(t *testing.T) {
		o := n.options(t)
		o.Rows = nil
		n.keeps(t, o)
	})
	t.Run("children numbered alike", func(t *testing.T) {
		// As nerdctl and BuildKit label the manifests that they make.
		info := must[content.Info](t)(cs.Info(ctx, n.app.Manifest))
		old := info.Labels
		info.Labels = map[string]string{"containerd.io/gc.ref.content.0": n.config(t, n.app).String()}
		for i, l := range n.app.Layers {
			info.Labels[fmt.Sprint("containerd.io/gc.ref.content.", i+1)] = l.Digest.String()
		}
		must[content.Info](t)(cs.Update(ctx, info, "labels"))
		n.keeps(t, n.options(t))
		info.Labels = old
		must[content.Info](t)(cs.Update(ctx, info, "labels"))
	})
	t.Run("encrypted", func(t *testing.T) {
		manifest := ocispec.Manifest{}
		check(t, json.Unmarshal(must[[]byte](t)(os.ReadFile(n.Blob(n.app.Manifest))), &manifest))
		manifest.Layers[1].MediaType = containerdimages.MediaTypeImageLayerGzipEncrypted
		d := n.store(t, ctx, manifest)
		img := must[containerdimages.Image](t)(cl.ImageService().Create(ctx, containerdimages.Image{Name: "encrypted", Target: d}))
		// The plain one is not there, so that only the encrypted remains.
		info := must[content.Info](t)(cs.Info(ctx, n.app.Manifest))
		check(t, breaks["corrupt"](n.Blob(n.app.Manifest)))
		n.keeps(t, n.options(t), "it is encrypted")
		check(t, breaks["corrupt"](n.Blob(info.Digest)))
		check(t, cl.ImageService().Delete(ctx, img.Name))
		check(t, cs.Delete(ctx, d.Digest))
	})
	t.Run("in another namespace", func(t *testing.T) {
		_, err := n.Containerd.Ctr(t.Context(), "--namespace", "other", "images", "pull", "--plain-http", "--snapshotter", "durable", n.app.Ref)
		check(t, err)
		// The row of this namespace goes; the other keeps the file.
		check(t, cs.Delete(ctx, bad))
		n.keeps(t, n.options(t))
	})
	t.Run("and then corrupt", func(t *testing.T) {
		check(t, breaks["corrupt"](n.Blob(bad)))
		// The file is one for both namespaces: a pull in this one would find it.
		done := must[repull.Dropped](t)(n.drop(t, n.app, 1))
		if !slices.Contains(done.Images, n.app.Ref) || len(done.Blobs) != 1 || done.Blobs[0].Digest != bad {
			t.Errorf("dropped %v", done)
		}
		n.wantNoKeys(t, n.app, 1)
		check(t, n.pull(t, n.app))
	})
}

// store stores a manifest with labels that keep its children, and no others.
func (n *node) store(t *testing.T, ctx context.Context, m ocispec.Manifest) ocispec.Descriptor {
	t.Helper()
	_, cl := n.client(t)
	p := must[[]byte](t)(json.Marshal(m))
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(p), Size: int64(len(p))}
	labels := map[string]string{"containerd.io/gc.ref.content.0": m.Config.Digest.String(), "containerd.io/gc.root": "a test"}
	check(t, content.WriteBlob(ctx, cl.ContentStore(), d.Digest.String(), bytes.NewReader(p), d, content.WithLabels(labels)))
	return d
}

// TestDropDespiteLiar: a manifest in another namespace that claims the layer for a
// blob that is none does not prevent the repair of the image.
func TestDropDespiteLiar(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	p := n.inUse(t)
	_, cl := n.client(t)
	elsewhere := namespaces.WithNamespace(t.Context(), "tenant")
	_, err := n.Containerd.Ctr(t.Context(), "--namespace", "tenant", "images", "pull", "--plain-http", "--snapshotter", "durable", n.pause.Ref)
	check(t, err)
	manifest := ocispec.Manifest{}
	check(t, json.Unmarshal(must[[]byte](t)(os.ReadFile(n.Blob(n.app.Manifest))), &manifest))
	config := must[[]byte](t)(os.ReadFile(n.Blob(manifest.Config.Digest)))
	check(t, content.WriteBlob(elsewhere, cl.ContentStore(), "config", bytes.NewReader(config), manifest.Config, content.WithLabels(map[string]string{"containerd.io/gc.root": "a test"})))
	for i := range manifest.Layers {
		manifest.Layers[i] = ocispec.Descriptor{MediaType: n.pause.Layers[0].MediaType, Digest: n.pause.Layers[0].Digest, Size: n.pause.Layers[0].Size}
	}
	n.store(t, elsewhere, manifest)

	n.damage(t, n.app, 1)
	check(t, os.Remove(n.Blob(n.app.Layers[1].Digest)))
	if done := must[repull.Dropped](t)(n.drop(t, n.app, 1)); len(done.Images) != 3 {
		t.Errorf("dropped %v", done)
	}
	n.usable(t, p, n.app)
}

// TestDropConfirm: the caller confirms once, after everything that can be taken back
// and before anything that cannot; its refusal leaves no trace, and neither does a
// blob that is good again by then.
func TestDropConfirm(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	check(t, n.pull(t, n.app))
	bad := n.Blob(n.app.Layers[1].Digest)
	check(t, breaks["corrupt"](bad))
	n.damage(t, n.app, 1)
	var calls []string
	c := n.repairer(t, grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if changes(method) {
			calls = append(calls, strings.TrimPrefix(path.Base(path.Dir(method)), "containerd.services.")+"/"+path.Base(method))
		}
		return invoke(ctx, method, req, reply, conn, opts...)
	}))
	before := n.records(t)
	refusal := errors.New("the layer is whole")
	for name, confirm := range map[string]func(context.Context) error{
		"refused": func(context.Context) error { return refusal },
		"mended":  func(context.Context) error { return breaks["corrupt"](bad) },
	} {
		t.Run(name, func(t *testing.T) {
			calls = nil
			confirmed, o := 0, n.options(t)
			o.Confirm = func(ctx context.Context) error {
				confirmed++
				calls = append(calls, "confirm")
				return confirm(ctx)
			}
			done, err := c.Drop(t.Context(), layer(n.app, 1), o)
			var good *repull.GoodBlobError
			if !errors.Is(err, refusal) && !errors.As(err, &good) || !done.Nothing() || confirmed != 1 {
				t.Errorf("Confirm called %d times; Drop: %v, %v", confirmed, done, err)
			}
			at := slices.Index(calls, "confirm")
			for i, call := range calls {
				if lease := strings.HasPrefix(call, "leases."); i != at && (!lease || i > at && call != "leases.v1.Leases/Delete") {
					t.Errorf("calls %q", calls)
				}
			}
			if after := n.records(t); after != before {
				t.Errorf("Drop changed containerd's records to\n%s\nfrom\n%s", after, before)
			}
			if good != nil {
				check(t, breaks["corrupt"](bad))
			}
		})
	}
	o := n.options(t)
	o.Confirm = func(context.Context) error { return nil }
	if done := must[repull.Dropped](t)(c.Drop(t.Context(), layer(n.app, 1), o)); len(done.Images) != 3 {
		t.Errorf("dropped %v", done)
	}
}

// TestDropLeavesNoStreams: a daemon that drops for years must not keep a stream of
// each drop.
func TestDropLeavesNoStreams(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	var streams []context.Context
	c := n.repairer(t, grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, call grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		s, err := call(ctx, desc, conn, method, opts...)
		if err == nil {
			streams = append(streams, s.Context())
		}
		return s, err
	}))
	check(t, n.pull(t, n.app))
	check(t, breaks["corrupt"](n.Blob(n.app.Layers[1].Digest)))
	n.damage(t, n.app, 1)
	must[repull.Dropped](t)(c.Drop(t.Context(), layer(n.app, 1), n.options(t)))
	if len(streams) == 0 {
		t.Fatal("no streams were seen")
	}
	for _, s := range streams {
		if s.Err() == nil {
			t.Error("a stream outlives Drop")
		}
	}
}

// TestDropHeldDiscarded: a container holds the layer, and its blob was never kept. The
// command that the error names brings it.
func TestDropHeldDiscarded(t *testing.T) {
	t.Parallel()
	n := newNodeWith(t, nodeOptions{images: "discard_unpacked_layers = true"})
	p := n.inUse(t)
	n.collect(t)
	running := must[string](t)(p.create(t, n.app, "wait"))
	check(t, p.start(t, running))
	n.damage(t, n.app, 1)
	_, err := n.drop(t, n.app, 1)
	var held *repull.HeldError
	if !errors.As(err, &held) || !slices.Equal(held.Lacking, []digest.Digest{n.app.Layers[1].Digest}) {
		t.Fatalf("Drop of a layer that a container holds: %v", err)
	}
	_, command, ok := strings.Cut(err.Error(), "ctr -n k8s.io ")
	if !ok {
		t.Fatalf("no command in %v", err)
	}
	must[string](t)(n.ctr(t, append(strings.Fields(command), "--plain-http")...))
	if body := must[[]byte](t)(os.ReadFile(n.Blob(n.app.Layers[1].Digest))); digest.FromBytes(body) != n.app.Layers[1].Digest {
		t.Error("the blob is not back")
	}
}

// TestForeignContentRoot: the daemon reads the content store of another containerd, or
// an empty directory. What is damaged stays so, with its image and its blobs.
func TestForeignContentRoot(t *testing.T) {
	for _, c := range []struct {
		name string
		fill bool // with a store that another containerd has written
	}{{"another store", true}, {"empty", false}} {
		t.Run(c.name, func(t *testing.T) {
			n := newNodeWith(t, nodeOptions{acts: true, contentRoot: "foreign"})
			foreign := filepath.Join(filepath.Dir(filepath.Dir(n.Daemon.Root)), "foreign")
			check(t, os.MkdirAll(foreign, 0o755))
			if c.fill {
				check(t, os.MkdirAll(filepath.Join(foreign, "blobs/sha256"), 0o755))
				text := []byte("{}")
				check(t, os.WriteFile(filepath.Join(foreign, "blobs/sha256", digest.FromBytes(text).Encoded()), text, 0o444))
			}
			check(t, n.pull(t, n.app))
			check(t, n.GoOffline())
			fs := n.directories(t, n.app)[1]
			check(t, n.Daemon.Kill())
			check(t, os.RemoveAll(fs))
			check(t, os.Mkdir(fs, 0o755))
			check(t, kit.NewBoot())
			check(t, n.Daemon.Start(t.Context()))
			want := "content_root"
			waitFor(t, time.Minute, func() error {
				log := must[string](t)(n.Daemon.Log())
				if !strings.Contains(log, "layer_not_healed") || !strings.Contains(log, want) {
					return fmt.Errorf("the log does not contain %s", want)
				}
				return nil
			})
			time.Sleep(2 * time.Second) // for a drop, if there is one
			names := must[string](t)(n.ctr(t, "images", "ls", "-q"))
			if !strings.Contains(names, n.app.Ref) {
				t.Errorf("the image is gone; left: %s", names)
			}
			for _, l := range n.app.Layers {
				if body := must[[]byte](t)(os.ReadFile(n.Blob(l.Digest))); digest.FromBytes(body) != l.Digest {
					t.Errorf("blob %s is not what it was", l.Digest)
				}
			}
		})
	}
}

package full

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Bench is what all experiments share: programs, images in a registry, and
// their references. None of it is on a disk under test.
type Bench struct {
	*lab.Bench
	binaries kit.Binaries
	dir      string
	registry *kit.Registry
	hosts    string // directory in which containerd finds where the registry is
	images   []Image
	layers   map[digest.Digest]*layer // by chain ID
}

// Image is an image of the registry, and what a container sees in it.
type Image struct {
	kit.Pushed
	Config ocispec.Descriptor
	Tree   kit.Tree
}

// layer is one layer of one or several images.
type layer struct {
	parent digest.Digest // chain ID, empty for the lowest
	tree   kit.Tree
}

// host is the name of the registry in the names of images. The port is another
// in each run, and a name with a port in it would distinguish recordings that
// are the same.
const host = "registry.test"

// imageSeed makes the content of the images. It is the same for all recordings:
// theirs is a matter of order and time.
const imageSeed = 1

// NewBench starts a registry, fills it, and takes the references.
func NewBench(ctx context.Context, programs *lab.Bench) (_ *Bench, err error) {
	b := &Bench{Bench: programs, layers: map[digest.Digest]*layer{}}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("bench of the full stack: %w", err), b.Close())
		}
	}()
	if b.binaries, err = kit.Build(ctx); err != nil {
		return b, err
	}
	if b.dir, err = os.MkdirTemp("", "full"); err != nil {
		return b, err
	}
	if b.registry, err = kit.StartRegistry(filepath.Join(b.dir, "registry")); err != nil {
		return b, err
	}
	if err = b.writeHosts(); err != nil {
		return b, err
	}
	images, err := buildImages()
	if err != nil {
		return b, err
	}
	for i, image := range images {
		name := fmt.Sprintf("image%d", i)
		pushed, err := kit.Push(ctx, b.registry, name, image)
		if err != nil {
			return b, err
		}
		pushed.Ref = host + "/" + name + ":latest"
		b.images = append(b.images, Image{Pushed: pushed})
	}
	return b, b.reference(ctx)
}

// Close stops the registry. The programs belong to the caller that made them.
func (b *Bench) Close() error {
	var err error
	if b.registry != nil {
		err = b.registry.Close()
	}
	return errors.Join(err, os.RemoveAll(b.dir))
}

// writeHosts writes the file by which containerd finds the registry under its
// name.
func (b *Bench) writeHosts() error {
	b.hosts = filepath.Join(b.dir, "hosts")
	dir := filepath.Join(b.hosts, host)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	url := "http://" + b.registry.Host
	text := fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = ['pull', 'resolve']\n", url, url)
	return os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o644)
}

// buildImages makes four images that share layers, with every kind of entry and
// an empty layer among them.
func buildImages() ([]kit.Image, error) {
	plan, err := workload.NewPlan(imageSeed, workload.Size{Chains: 2, Layers: 4})
	if err != nil {
		return nil, err
	}
	var chains [2][]kit.Layer
	for c := range chains {
		for depth, l := range plan.Chains[c].Layers {
			entries, err := entriesOf(l.Tar)
			if err != nil {
				return nil, err
			}
			form := []kit.Compression{kit.Gzip, kit.Zstd, kit.Plain}[depth%3]
			chains[c] = append(chains[c], kit.NewLayer(form, entries...))
		}
	}
	x, y := chains[0], chains[1]
	return []kit.Image{
		{Layers: x},
		{Layers: []kit.Layer{x[0], x[1], y[2], y[3]}},
		{Layers: y[:3]},
		{Layers: []kit.Layer{x[0], kit.NewLayer(kit.Gzip), y[1]}},
	}, nil
}

// entriesOf reads a tar back into the entries of an image.
func entriesOf(content []byte) ([]kit.Entry, error) {
	var out []kit.Entry
	for r := tar.NewReader(bytes.NewReader(content)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		body, err := io.ReadAll(r)
		if err != nil {
			return nil, err
		}
		e := kit.File(h.Name, h.Mode, string(body))
		e.Header = *h
		out = append(out, e)
	}
}

// reference has the built-in overlayfs unpack all images and remembers the
// trees of all and of each of their layers.
func (b *Bench) reference(ctx context.Context) (err error) {
	n, err := b.boot(ctx, builtIn, filepath.Join(b.dir, "reference"), "", filepath.Join(b.dir, "run"), false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.stop()) }()
	for i := range b.images {
		image := &b.images[i]
		if err := n.pull(ctx, image.Ref); err != nil {
			return err
		}
		known, err := n.client.GetImage(ctx, image.Ref)
		if err != nil {
			return err
		}
		if image.Config, err = known.Config(ctx); err != nil {
			return err
		}
		err = n.view(ctx, image.Top(), func(mounts []mount.Mount) error {
			_, lower, err := workload.Directories(mounts)
			if err == nil && len(lower) != len(image.ChainIDs) {
				err = fmt.Errorf("reference of %s: %d directories for %d layers", image.Ref, len(lower), len(image.ChainIDs))
			}
			if err != nil {
				return err
			}
			parent := digest.Digest("")
			for i, id := range image.ChainIDs {
				tree, err := workload.Tree(lower[len(lower)-1-i])
				if err != nil {
					return err
				}
				b.layers[id] = &layer{parent, tree}
				parent = id
			}
			image.Tree, err = workload.Merged(mounts, b.dir)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// image returns the image of a name.
func (b *Bench) image(ref string) (Image, bool) {
	for _, i := range b.images {
		if i.Ref == ref {
			return i, true
		}
	}
	return Image{}, false
}

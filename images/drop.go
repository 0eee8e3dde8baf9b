package images

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// keepFor is how long the good blobs and layers of a dropped image wait for the
// next pull. The kubelet tries every five minutes at the latest.
const keepFor = time.Hour

// Options of Drop.
type Options struct {
	Rows        Rows   // the snapshots of the snapshotter; without them, images alone tell what stands on a layer
	ContentRoot string // of containerd's content store; finds blobs that have grown, when set

	// BlobsOfHeld drops the blob of the layer, if it is bad, even when containers
	// hold the layer. Nobody can use it, and once its row is gone ctr content
	// fetch brings it back, with which the layer can be healed under them.
	BlobsOfHeld bool
}

// Dropped is what Drop has done.
type Dropped struct {
	Images    []string // names
	Snapshots []string // keys
	Blobs     []Blob   // bad ones, whose rows and files are gone
}

// Nothing tells that there was nothing to do.
func (d Dropped) Nothing() bool { return len(d.Images)+len(d.Snapshots)+len(d.Blobs) == 0 }

func (d Dropped) String() string {
	if d.Nothing() {
		return "nothing to drop"
	}
	text := fmt.Sprintf("dropped %d image names, %d snapshots, %d bad blobs", len(d.Images), len(d.Snapshots), len(d.Blobs))
	for _, b := range d.Blobs {
		text += fmt.Sprintf(", %s (%s)", b.Digest, b.Flaw)
	}
	if len(d.Images) > 0 {
		text += "; until the registry can be reached the image is not on this node: " + strings.Join(d.Images, " ")
	}
	return text
}

// Drop makes containerd forget a layer that is not whole, together with the images
// that have it and those of their blobs that are bad, so that the next pull fetches
// and unpacks them. It asks containerd for the layer first: when the snapshotter
// says that it is whole, as after a pull that was quicker, nothing is done.
//
// The error is a [HeldError] when a container holds the layer: nothing is changed
// then, but for what [Options] say of blobs. After any other error some steps may
// have been done; call again.
func (c *Containerd) Drop(ctx context.Context, layer Layer, o Options) (done Dropped, err error) {
	// What containerd is asked for below is for this namespace, but for blobs.
	ctx = namespaces.WithNamespace(ctx, layer.Namespace)
	whole, err := c.whole(ctx, layer)
	if err != nil || whole {
		return done, err
	}
	p, err := c.look(ctx, layer, o)
	if err != nil {
		return done, fmt.Errorf("drop %v: %w", layer, err)
	}
	steps := []step{c.keep, c.dropImages, c.dropBlobs, c.dropKeys, c.collect}
	if len(p.holders) > 0 {
		if steps = nil; len(p.bad) > 0 {
			steps = []step{c.dropBlobs}
		}
	}
	for i, step := range steps {
		if i > 0 {
			// A pull, or another Drop and a pull, may have been quicker.
			if whole, err := c.whole(ctx, layer); err != nil || whole {
				return done, err
			}
		}
		if err := step(ctx, layer, p, &done); err != nil {
			return done, fmt.Errorf("drop %v: %w", layer, err)
		}
	}
	if len(p.holders) > 0 {
		return done, p.held(layer, done)
	}
	return done, nil
}

// step is a part of Drop, which takes what the steps before have left.
type step func(context.Context, Layer, *plan, *Dropped) error

// whole asks containerd, which asks the snapshotter, about the layer. The layer
// may be gone from containerd's records, or from the snapshotter's.
func (c *Containerd) whole(ctx context.Context, layer Layer) (whole bool, err error) {
	_, err = c.snapshotter(layer).Stat(ctx, layer.ChainID.String())
	switch {
	case err == nil:
		return true, nil
	case errdefs.IsNotFound(err), errdefs.IsFailedPrecondition(err), errdefs.IsDataLoss(err):
		return false, nil
	}
	return false, fmt.Errorf("drop %v: look whether it is whole: %w", layer, err)
}

func (p *plan) held(layer Layer, done Dropped) error {
	e := &HeldError{Layer: layer, Blobs: done.Blobs}
	for _, h := range p.holders {
		e.Holders = append(e.Holders, h.String())
	}
	for _, i := range p.images {
		e.Images = append(e.Images, i.Name)
	}
	return e
}

// keep leases what the next pull can use, and the damaged snapshots until the bad
// blobs are gone: see dropBlobs. The lease is flat: a blob of it keeps nothing that
// it refers to, so in the end it keeps what is named here and nothing else.
func (c *Containerd) keep(ctx context.Context, layer Layer, p *plan, _ *Dropped) error {
	if len(p.keep)+len(p.bad) == 0 {
		return nil // nothing of an image: only a snapshot that was left over
	}
	var all []leases.Resource
	for _, d := range p.keep {
		all = append(all, leases.Resource{ID: d.String(), Type: "content"})
	}
	for _, name := range slices.Concat(p.below, p.keys) {
		all = append(all, leases.Resource{ID: name, Type: "snapshots/" + layer.Snapshotter})
	}
	lease, err := c.leases.Create(ctx, leases.WithRandomID(), leases.WithExpiration(keepFor),
		leases.WithLabel("containerd.io/gc.flat", time.Now().UTC().Format(time.RFC3339)))
	if err != nil {
		return fmt.Errorf("lease blobs and snapshots: %w", err)
	}
	for _, r := range all {
		if err := c.leases.AddResource(ctx, lease, r); err != nil {
			return fmt.Errorf("lease %s: %w", r.ID, err)
		}
	}
	return nil
}

// dropImages deletes the names, each only while it means what it meant.
func (c *Containerd) dropImages(ctx context.Context, _ Layer, p *plan, done *Dropped) error {
	for _, i := range p.images {
		_, err := c.images.Delete(ctx, &imagesapi.DeleteImageRequest{Name: i.Name, Target: i.Target})
		if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("delete image %s: %w", i.Name, err)
		}
		done.Images = append(done.Images, i.Name)
	}
	return nil
}

// dropBlobs deletes the rows of bad blobs, and waits until the files are deleted.
//
// The rows go in every namespace, because one that stays keeps the file. And the
// damaged snapshots stay meanwhile: no pull gets past them, and so none takes a
// file that is about to be deleted for the blob. Configs and manifests are fetched
// before, so it may have happened to them, and is looked for.
func (c *Containerd) dropBlobs(ctx context.Context, layer Layer, p *plan, done *Dropped) error {
	all, err := c.listNamespaces(ctx)
	if err != nil {
		return err
	}
	for tries := 0; ; tries++ {
		bad, mended, err := c.lookAgain(ctx, all, p)
		if err != nil {
			return err
		}
		if len(bad) == 0 && tries > 0 {
			return nil
		}
		if tries == 5 {
			return fmt.Errorf("blob %s: deleted, and taken again by a pull: %w", bad[0].Digest, errdefs.ErrUnavailable)
		}
		if tries == 0 {
			done.Blobs = slices.DeleteFunc(slices.Clone(p.bad), func(b Blob) bool { return mended[b.Digest] })
		}
		for _, b := range bad {
			for _, ns := range all {
				err := c.content.Delete(namespaces.WithNamespace(ctx, ns), b.Digest)
				if err != nil && !errdefs.IsNotFound(err) {
					return fmt.Errorf("delete blob %s in namespace %s: %w", b.Digest, ns, err)
				}
			}
		}
		if err := c.collectGarbage(ctx, layer, false); err != nil {
			return err
		}
	}
}

// lookAgain returns those of the bad blobs that any namespace has on record and
// that are still bad, and those that are not, because a pull was quicker.
func (c *Containerd) lookAgain(ctx context.Context, all []string, p *plan) (bad []Blob, mended map[digest.Digest]bool, err error) {
	mended = map[digest.Digest]bool{}
	for _, b := range p.bad {
		for _, ns := range all {
			ctx := namespaces.WithNamespace(ctx, ns)
			info, err := c.content.Info(ctx, b.Digest)
			if errdefs.IsNotFound(err) {
				continue
			}
			if err != nil {
				return nil, nil, fmt.Errorf("look at blob %s in namespace %s: %w", b.Digest, ns, err)
			}
			flaw, err := c.flaw(ctx, info, p.contentRoot)
			if err != nil {
				return nil, nil, err
			}
			if flaw != "" {
				bad = append(bad, Blob{b.Digest, b.Size, flaw})
				break
			}
			mended[b.Digest] = true
		}
	}
	return bad, mended, nil
}

// dropKeys removes the snapshots. containerd refuses to remove one that has
// others on top, so those that it refuses are tried again as long as any goes.
func (c *Containerd) dropKeys(ctx context.Context, layer Layer, p *plan, done *Dropped) error {
	sn := c.snapshotter(layer)
	for left := p.keys; len(left) > 0; {
		var refused []string
		var errs []error
		for _, key := range left {
			err := sn.Remove(ctx, key)
			switch {
			case err == nil:
				done.Snapshots = append(done.Snapshots, key)
			case errdefs.IsNotFound(err):
			case errdefs.IsFailedPrecondition(err):
				refused = append(refused, key)
				errs = append(errs, fmt.Errorf("remove snapshot %s: %w", key, err))
			default:
				return fmt.Errorf("remove snapshot %s: %w", key, err)
			}
		}
		if len(refused) == len(left) {
			return errors.Join(errs...)
		}
		left = refused
	}
	return nil
}

// collect has containerd, and so the snapshotter, delete what is left.
func (c *Containerd) collect(ctx context.Context, layer Layer, _ *plan, done *Dropped) error {
	return c.collectGarbage(ctx, layer, len(done.Snapshots) == 0)
}

// collectGarbage has containerd delete what has no row any more, and waits for it.
// containerd remembers only in memory that there is something to delete, so a
// little is made and deleted, a blob always and a snapshot if asked for: an earlier
// Drop, or containerd, may have been cut short.
func (c *Containerd) collectGarbage(ctx context.Context, layer Layer, snapshot bool) error {
	lease, err := c.leases.Create(ctx, leases.WithRandomID(), leases.WithExpiration(keepFor))
	if err != nil {
		return fmt.Errorf("collect garbage: %w", err)
	}
	leased := leases.WithLease(ctx, lease.ID)
	name := "durable-snapshotter-collect-" + rand.Text()
	d := digest.FromString(name)
	err = content.WriteBlob(leased, c.content, name, bytes.NewReader([]byte(name)), ocispec.Descriptor{Digest: d, Size: int64(len(name))})
	if err == nil {
		err = c.content.Delete(ctx, d)
	}
	if err == nil && snapshot {
		sn := c.snapshotter(layer)
		if _, err = sn.Prepare(leased, name, ""); err == nil {
			err = sn.Remove(ctx, name)
		}
	}
	// Deleting a lease is how one asks for a collection and waits for it.
	if err := errors.Join(err, c.leases.Delete(ctx, lease, leases.SynchronousDelete)); err != nil {
		return fmt.Errorf("collect garbage: %w", err)
	}
	return nil
}

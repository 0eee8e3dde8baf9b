package repull

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Options of Drop.
type Options struct {
	Rows        Rows   // the snapshots of the snapshotter; without them, images alone show what stands on a layer
	ContentRoot string // as configured; an error names it when it is not containerd's

	// BlobsOfHeld drops the blob of the layer, if it is bad, even when containers
	// hold the layer. It is of no use, and once its row is gone ctr content
	// fetch brings it back, with which the layer can be healed under them.
	BlobsOfHeld bool

	// Confirm is called right before the first step that cannot be taken back. An
	// error, which is the reason why the layer must not be dropped, ends Drop; nothing has
	// been changed then. It is not called when nil.
	Confirm func(context.Context) error
}

// Dropped is what Drop has done.
type Dropped struct {
	Images    []string // names
	Snapshots []string // keys
	Blobs     []Blob   // bad ones, whose rows and files are gone
}

// Blob is a blob that containerd has on record and that is not what its digest
// requires.
type Blob struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"` // on record
	Flaw   string        `json:"flaw"` // missing, short, grown, corrupt or unreadable
}

// Nothing reports whether there was nothing to do.
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
// and unpacks them. It calls Stat for the layer first: when the snapshotter
// reports that it is whole, as after a pull that was quicker, nothing is done.
//
// Nothing is dropped without evidence of containerd's own: it has no record of the
// layer's blob, or its bytes, read through its API, have not the digest. It is
// gathered twice, the second time right before the first step that cannot be taken
// back. The error is a [GoodBlobError] when containerd has the blob, and an
// [UnknownBlobError] when it cannot be determined which blob that is.
//
// The error is a [HeldError] when a container holds the layer: nothing is changed
// then, but for blobs as [Options] allow it. After any other error some steps may
// have been done; call again. The damaged layer itself is on record until all others
// are done, and no pull gets past it.
//
// A lease keeps the good blobs and layers for the next pull, see [Containerd.Release].
// After an error it is deleted, unless a name or a snapshot is gone already.
func (c *Containerd) Drop(ctx context.Context, layer Layer, o Options) (done Dropped, err error) {
	// The requests to containerd below are for this namespace, but for those about blobs.
	ctx = namespaces.WithNamespace(ctx, layer.Namespace)
	// The stream of a content writer ends with its context, and not before.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	whole, err := c.whole(ctx, layer)
	if err == nil && whole {
		err = c.Release(ctx, layer) // an earlier Drop that failed may have left it
	}
	if err != nil || whole {
		return done, err
	}
	p, err := c.plan(ctx, layer, o)
	if err != nil {
		return done, fmt.Errorf("drop %v: %w", layer, err)
	}
	d := drop{c: c, layer: layer, options: o, plan: p}
	ready, err := d.take(ctx)
	if err = d.finish(ctx, ready, err); err != nil || ready || len(p.holders) == 0 {
		return d.done, err
	}
	return d.done, p.held(layer, d.done)
}

// drop is one call of Drop: what it is to do, and what it has done.
type drop struct {
	c       *Containerd
	layer   Layer
	options Options
	plan    *plan
	done    Dropped
}

// steps are what Drop does, in order. What can be refused comes before the names.
func (d *drop) steps() []step {
	if len(d.plan.holders) > 0 {
		if len(d.plan.bad) == 0 {
			return nil
		}
		return []step{d.confirm, d.dropBlobs}
	}
	early, late := d.dropImages(true), d.dropImages(false)
	return []step{d.keep, d.confirm, d.dropAbandoned, d.dropAbove, early, d.dropBlobs, late, d.dropDamaged, d.collect}
}

// take takes the steps, and stops when the layer turns out to be ready: a pull, or another
// Drop and a pull, was quicker.
func (d *drop) take(ctx context.Context) (ready bool, err error) {
	for i, step := range d.steps() {
		if i > 0 {
			if ready, err := d.c.whole(ctx, d.layer); err != nil || ready {
				return ready, err
			}
		}
		if err := step(ctx); err != nil {
			return false, fmt.Errorf("drop %v: %w", d.layer, err)
		}
	}
	return false, nil
}

// step is a part of Drop, which takes what the steps before have left.
type step func(context.Context) error

// whole reports whether the layer is ready, by a Stat of containerd, which passes it on to
// the snapshotter. The layer may be gone from containerd's records, or from the
// snapshotter's.
func (c *Containerd) whole(ctx context.Context, layer Layer) (whole bool, err error) {
	_, err = c.snapshotter(layer).Stat(ctx, layer.ChainID.String())
	switch {
	case err == nil:
		return true, nil
	case errdefs.IsNotFound(err), errdefs.IsFailedPrecondition(err), errdefs.IsDataLoss(err):
		return false, nil
	}
	return false, fmt.Errorf("drop %v: check whether it is ready: %w", layer, err)
}

func (p *plan) held(layer Layer, done Dropped) error {
	e := &HeldError{Layer: layer, Blobs: done.Blobs, Lacking: p.lacking}
	for _, h := range p.holders {
		e.Holders = append(e.Holders, h.String())
	}
	for _, i := range p.images {
		e.Images = append(e.Images, i.Name)
	}
	return e
}

// confirm is the second time that all is verified, before anything is dropped.
func (d *drop) confirm(ctx context.Context) error {
	if d.options.Confirm != nil {
		if err := d.options.Confirm(ctx); err != nil {
			return err
		}
	}
	l, err := d.c.lib.Read(ctx, d.layer.Snapshotter)
	if err != nil {
		return err
	}
	keys := map[string]bool{d.layer.ChainID.String(): true}
	for _, k := range d.plan.above {
		keys[k] = true
	}
	return d.c.evidence(ctx, d.layer, l, keys, d.plan.contentRoot, d.options.ContentRoot)
}

// dropImages returns the step that deletes the names, each only while it means what it
// meant: the early ones, or the others. See image.
//
// A name that was written since Drop began belongs to a pull, which does that before it
// unpacks (client/pull.go, Pull). Its unpacker may come to the damaged layer when that
// is gone, and succeed; without the name nothing would keep what it has unpacked. So
// the step ends, and the next Drop finds out what came of the pull.
func (d *drop) dropImages(early bool) step {
	return func(ctx context.Context) error {
		for _, i := range d.plan.images {
			if i.early != early {
				continue
			}
			err := View{d.c}.DeleteImage(ctx, i.Image)
			if err != nil && !errdefs.IsNotFound(err) {
				return err
			}
			d.plan.names--
			if err == nil {
				d.done.Images = append(d.done.Images, i.Name)
			}
		}
		return nil
	}
}

// dropBlobs deletes the rows of bad blobs, and waits until the files are deleted.
//
// The rows go in every namespace, because one that stays keeps the file. And the
// damaged snapshot stays meanwhile: no pull of the namespace gets past it to the layers
// above, and so none takes a file that is about to be deleted for the blob (an unpack
// fetches layers from the first one on that it has to extract, and those below the
// damaged one are there: core/unpack/unpacker.go, startFetch). Configs and manifests
// are fetched before, and all layers by a pull that fetches everything, so it may have
// happened, and is checked.
func (d *drop) dropBlobs(ctx context.Context) error {
	all, err := d.c.listNamespaces(ctx)
	if err != nil {
		return err
	}
	for tries := 0; ; tries++ {
		bad, mended, err := d.stillBad(ctx, all)
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
			d.done.Blobs = slices.DeleteFunc(slices.Clone(d.plan.bad), func(b Blob) bool { return mended[b.Digest] })
		}
		for _, b := range bad {
			for _, ns := range all {
				err := d.c.content.Delete(namespaces.WithNamespace(ctx, ns), b.Digest)
				if err != nil && !errdefs.IsNotFound(err) {
					return fmt.Errorf("delete blob %s in namespace %s: %w", b.Digest, ns, err)
				}
			}
		}
		if err := d.c.collectGarbage(ctx, d.layer, false); err != nil {
			return err
		}
	}
}

// stillBad returns those of the bad blobs that any namespace has on record and
// that are still bad, and those that are not, because a pull was quicker.
func (d *drop) stillBad(ctx context.Context, all []string) (bad []Blob, mended map[digest.Digest]bool, err error) {
	mended = map[digest.Digest]bool{}
	for _, b := range d.plan.bad {
		for _, ns := range all {
			ctx := namespaces.WithNamespace(ctx, ns)
			info, err := d.c.content.Info(ctx, b.Digest)
			if errdefs.IsNotFound(err) {
				continue
			}
			if err != nil {
				return nil, nil, fmt.Errorf("get blob %s in namespace %s: %w", b.Digest, ns, err)
			}
			flaw, err := d.c.lib.Flaw(ctx, info, d.plan.contentRoot)
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

// dropAbove removes the snapshots on the damaged one.
func (d *drop) dropAbove(ctx context.Context) error {
	return d.dropKeys(ctx, d.plan.above)
}

// dropDamaged removes the damaged snapshot.
func (d *drop) dropDamaged(ctx context.Context) error {
	return d.dropKeys(ctx, []string{d.layer.ChainID.String()})
}

// dropKeys removes snapshots. containerd refuses to remove one that has others on top,
// so those that it refuses are tried again as long as any goes.
func (d *drop) dropKeys(ctx context.Context, keys []string) error {
	sn := d.c.snapshotter(d.layer)
	for left := keys; len(left) > 0; {
		var refused []string
		var errs []error
		for _, key := range left {
			err := sn.Remove(ctx, key)
			switch {
			case err == nil:
				d.done.Snapshots = append(d.done.Snapshots, key)
			case errdefs.IsNotFound(err):
			case errdefs.IsFailedPrecondition(err):
				refused = append(refused, key)
				errs = append(errs, fmt.Errorf("remove snapshot %s: %w", key, err))
			default:
				return fmt.Errorf("remove snapshot %s: %w", key, err)
			}
		}
		if len(refused) == len(left) {
			return d.dropLinked(ctx, refused, errors.Join(errs...))
		}
		left = refused
	}
	return nil
}

// collect has containerd, and so the snapshotter, delete what is left.
func (d *drop) collect(ctx context.Context) error {
	return d.c.collectGarbage(ctx, d.layer, len(d.done.Snapshots) == 0)
}

// collectGarbage has containerd delete what has no row any more, and waits for it.
// containerd remembers only in memory that there is something to delete, so a
// little is made and deleted, a blob always and a snapshot if snapshot is true: an earlier
// Drop, or containerd, may have been cut short.
func (c *Containerd) collectGarbage(ctx context.Context, layer Layer, snapshot bool) error {
	name := "durable-snapshotter-collect-" + rand.Text()
	lease, err := c.leases.Create(ctx, leases.WithID(name), leases.WithExpiration(collectFor))
	if err != nil {
		return fmt.Errorf("collect garbage: %w", err)
	}
	leased := leases.WithLease(ctx, lease.ID)
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
	if err != nil {
		return fmt.Errorf("collect garbage: %w", errors.Join(err, c.tidy(ctx, lease)))
	}
	// A synchronous deletion of a lease starts a collection and waits for it.
	if err := c.leases.Delete(ctx, lease, leases.SynchronousDelete); err != nil {
		return fmt.Errorf("collect garbage: %w", err)
	}
	return nil
}

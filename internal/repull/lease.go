package repull

import (
	"context"
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
	"github.com/opencontainers/go-digest"
)

// LeasePrefix begins the IDs of the leases that Drop makes. The snapshotter and the
// chain ID of the layer follow, so that a layer never has a second one, however often
// its Drop is begun.
const LeasePrefix = "durable-snapshotter-drop-"

func leaseID(l Layer) string { return LeasePrefix + l.Snapshotter + "-" + l.ChainID.String() }

const (
	// keepFor is how long the good blobs and layers of a dropped image wait for the
	// next pull. The kubelet tries every five minutes at the latest. The end is a date:
	// when the clock is set forward meanwhile, the pull fetches them again.
	keepFor = time.Hour
	// collectFor bounds the lease of a collection that is cut short.
	collectFor = 5 * time.Minute
	// tidyWithin bounds the deletion of a lease after an error, also when the caller's
	// context has ended.
	tidyWithin = time.Second
	// readyWithin bounds a Stat of a layer that is perhaps being verified.
	readyWithin = 5 * time.Second
)

// Labels of leases (containerd's core/metadata/gc.go:95 and 101).
const (
	expireLabel = "containerd.io/gc.expire"
	flatLabel   = "containerd.io/gc.flat"
)

// keep leases what the next pull can use, and the damaged snapshot until the bad
// blobs are gone: see dropBlobs. The lease is flat: a blob of it keeps nothing that
// it refers to, so in the end it keeps what is named here and nothing else.
func (d *drop) keep(ctx context.Context) error {
	if len(d.plan.keep)+len(d.plan.bad) == 0 {
		return nil // nothing of an image: only a snapshot that was left over
	}
	var all []leases.Resource
	for _, blob := range d.plan.keep {
		all = append(all, leases.Resource{ID: blob.String(), Type: "content"})
	}
	// Those above, too: a collection that is quicker than Remove would leave links to
	// them, see dropLinked.
	for _, name := range slices.Concat(d.plan.below, d.plan.above, []string{d.layer.ChainID.String()}) {
		all = append(all, leases.Resource{ID: name, Type: "snapshots/" + d.layer.Snapshotter})
	}
	for tries := 0; ; tries++ {
		err := d.lease(ctx, all)
		// Another Drop of the layer has made the lease meanwhile, or deleted it.
		if tries < 5 && (errdefs.IsAlreadyExists(err) || errdefs.IsNotFound(err)) {
			continue
		}
		return err
	}
}

// lease adds resources to the lease of a layer. The one that an earlier Drop has left
// is taken if it lasts long enough, else it is replaced.
func (d *drop) lease(ctx context.Context, all []leases.Resource) error {
	id := leaseID(d.layer)
	found, err := d.c.leases.List(ctx, fmt.Sprintf("id==%q", id))
	if err != nil {
		return fmt.Errorf("list leases: %w", err)
	}
	d.plan.lease, d.plan.leased = leases.Lease{}, false
	for _, l := range found {
		if lasts(l) {
			d.plan.lease = l
		} else if err := d.c.leases.Delete(ctx, l); err != nil {
			return fmt.Errorf("replace lease %s: %w", id, err)
		}
	}
	if d.plan.lease.ID == "" {
		d.plan.lease, err = d.c.leases.Create(ctx, leases.WithID(id), leases.WithExpiration(keepFor),
			leases.WithLabel(flatLabel, time.Now().UTC().Format(time.RFC3339)))
		if err != nil {
			return fmt.Errorf("lease blobs and snapshots: %w", err)
		}
		d.plan.leased = true
	}
	for _, r := range all {
		if err := d.c.leases.AddResource(ctx, d.plan.lease, r); err != nil {
			return fmt.Errorf("lease %s: %w", r.ID, err)
		}
	}
	return nil
}

// lasts reports whether a lease ends neither soon nor, after the clock was set back,
// much later than it should.
func lasts(l leases.Lease) bool {
	end, err := time.Parse(time.RFC3339, l.Labels[expireLabel])
	left := time.Until(end)
	return err == nil && left > keepFor/2 && left <= keepFor
}

// tidy deletes a lease after an error. What cannot be deleted ends with its date.
func (c *Containerd) tidy(ctx context.Context, lease leases.Lease) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tidyWithin)
	defer cancel()
	if err := c.leases.Delete(ctx, lease); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete lease %s: %w", lease.ID, err)
	}
	return nil
}

// Leased returns the layers of a snapshotter, in all namespaces, of which Drop has left
// a lease for the next pull.
func (c *Containerd) Leased(ctx context.Context, snapshotter string) (layers []Layer, err error) {
	all, err := c.listNamespaces(ctx)
	if err != nil {
		return nil, err
	}
	for _, ns := range all {
		found, err := c.leases.List(namespaces.WithNamespace(ctx, ns))
		if err != nil {
			return nil, fmt.Errorf("list the leases in namespace %s: %w", ns, err)
		}
		for _, l := range found {
			chainID, ok := strings.CutPrefix(l.ID, LeasePrefix+snapshotter+"-")
			if d := digest.Digest(chainID); ok && d.Validate() == nil {
				layers = append(layers, Layer{Namespace: ns, Snapshotter: snapshotter, ChainID: d})
			}
		}
	}
	return layers, nil
}

// Release deletes the lease that Drop has left for the next pull of a layer, which is
// committed again. It is no error when there is none.
func (c *Containerd) Release(ctx context.Context, layer Layer) error {
	err := c.leases.Delete(namespaces.WithNamespace(ctx, layer.Namespace), leases.Lease{ID: leaseID(layer)})
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete lease %s in namespace %s: %w", leaseID(layer), layer.Namespace, err)
	}
	return nil
}

// RepairPrefix begins the IDs of the leases of package images. The snapshotter and the target of
// the image's names follow.
const RepairPrefix = "durable-snapshotter-repair-"

// ReleasePulled deletes the leases that a repair has left for the next pull of images whose names
// it has deleted, as far as those names were written since.
func (c *Containerd) ReleasePulled(ctx context.Context, snapshotter string) error {
	all, err := c.listNamespaces(ctx)
	if err != nil {
		return err
	}
	for _, ns := range all {
		ctx := namespaces.WithNamespace(ctx, ns)
		left, err := c.leases.List(ctx, fmt.Sprintf("id~=%q", "^"+RepairPrefix+snapshotter+"-"))
		if err != nil {
			return fmt.Errorf("list the leases in namespace %s: %w", ns, err)
		}
		if len(left) == 0 {
			continue
		}
		images, err := c.listImages(ctx)
		if err != nil {
			return err
		}
		for _, l := range left {
			if !slices.ContainsFunc(images, func(i *imagesapi.Image) bool {
				return strings.HasSuffix(l.ID, "-"+target(i).String()) && i.GetCreatedAt().AsTime().After(l.CreatedAt)
			}) {
				continue
			}
			if err := c.leases.Delete(ctx, l); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("delete lease %s in namespace %s: %w", l.ID, ns, err)
			}
		}
	}
	return nil
}

// Ready reports whether containerd, and so the snapshotter, has the layer, whole. The
// error is Unavailable or a deadline while it is being verified.
func (c *Containerd) Ready(ctx context.Context, layer Layer) (bool, error) {
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, layer.Namespace), readyWithin)
	defer cancel()
	return c.whole(ctx, layer)
}

// abandoned returns the extraction keys that containerd has and the snapshotter has
// not, in the namespace of ctx. See dropAbandoned.
func (d *drop) abandoned(ctx context.Context) (keys []string, err error) {
	return d.leasedOnly(ctx, isExtraction)
}

// leasedOnly returns those of the snapshots' keys in leases of the namespace of ctx that
// which selects and that the snapshotter has not.
func (d *drop) leasedOnly(ctx context.Context, which func(key string) bool) (keys []string, err error) {
	all, err := d.c.leases.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list leases: %w", err)
	}
	sn, seen := d.c.snapshotter(d.layer), map[string]bool{}
	for _, l := range all {
		resources, err := d.c.leases.ListResources(ctx, l)
		if errdefs.IsNotFound(err) {
			continue // it has ended meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("list what lease %s keeps: %w", l.ID, err)
		}
		for _, r := range resources {
			if r.Type != "snapshots/"+d.layer.Snapshotter || !which(r.ID) || seen[r.ID] {
				continue
			}
			seen[r.ID] = true
			if _, err := sn.Stat(ctx, r.ID); errdefs.IsNotFound(err) {
				keys = append(keys, r.ID)
			} else if err != nil && !errdefs.IsFailedPrecondition(err) { // a damaged one is there
				return nil, fmt.Errorf("verify whether snapshot %s is there: %w", r.ID, err)
			}
		}
	}
	return keys, nil
}

// dropAbandoned removes the extraction keys that containerd has on record and the
// snapshotter has not. They are left when containerd's transaction is rolled back after
// the snapshotter's Commit has succeeded, as when containerd is killed in between, or
// its client's connection ends. Until the lease of the pull ends, after a day, such a
// key keeps containerd from removing the snapshot that it stands on, and containerd's
// API does not show which that is: Stat fails, and List leaves it out. So all of the
// namespace are removed.
//
// Nothing is lost with them: Commit and Mounts of such a key can only be answered with
// NotFound. And none of a pull at work is taken for one (containerd's
// core/metadata/snapshot.go, createSnapshot and Commit):
//
//   - Prepare puts a key into its lease in the transaction that also records the key,
//     after the snapshotter has answered. So a key that was seen in a lease had a row
//     of the snapshotter, and has it until it is committed or removed.
//   - During a Commit the snapshotter may have committed the key while containerd's
//     transaction, which forgets the key, is open. Remove needs a transaction, too, and
//     waits for that one: after it the key is gone, which is no error here, or it was
//     rolled back, and the key is one of those that are meant.
//
// Stat goes through containerd, which knows the row's own name. So the answer is of the
// snapshotter that containerd means, and NotFound needs no other evidence.
func (d *drop) dropAbandoned(ctx context.Context) error {
	keys, err := d.abandoned(ctx)
	if err != nil {
		return err
	}
	return d.dropKeys(ctx, keys)
}

// finish decides what becomes of the lease when Drop ends. It is for the next pull, and
// until then nothing else keeps the good blobs and layers; while an image name is left,
// that does. But a name keeps the damaged layer through those above it. Once one of them
// is gone, the lease stays also after an error, and with the next Drops that fail: a
// collection would take the layer, and no Drop would finish.
func (d *drop) finish(ctx context.Context, ready bool, err error) error {
	untouched := d.plan.leased && len(d.done.Snapshots)+len(d.done.Images) == 0 && (d.plan.names > 0 || d.done.Nothing())
	if d.plan.lease.ID == "" || !ready && (err == nil || !untouched) {
		return err
	}
	return errors.Join(err, d.c.tidy(ctx, d.plan.lease))
}

// snapshotLabel begins the labels of blobs that keep a snapshot (containerd's
// core/metadata/gc.go:74). The snapshotter follows.
const snapshotLabel = "containerd.io/gc.ref.snapshot."

// dropLinked removes snapshots that containerd refuses to remove because others stand
// on them, when no others do. A collection deletes a snapshot and leaves the link that
// its parent has to it (core/metadata/gc.go:1059), and Remove of the parent fails from
// then on. That comes of every extraction that is collected, a day after its client has
// died. A collection ignores links: so the snapshots are taken out of the
// leases and labels that keep them, and containerd collects.
//
// When there is a snapshot that only containerd has, it may stand on one of them, and
// nothing is done. The error is refused then, and whenever a snapshot is still there.
func (d *drop) dropLinked(ctx context.Context, keys []string, refused error) error {
	unknown, err := d.withoutRow(ctx)
	if err != nil {
		return errors.Join(refused, err)
	}
	if len(unknown) > 0 {
		return fmt.Errorf("%w; only containerd has %s, remove it if nothing uses it", refused, strings.Join(unknown, ", "))
	}
	if err := d.unlease(ctx, keys); err != nil {
		return errors.Join(refused, err)
	}
	labeled, err := d.unlabel(ctx, keys)
	if err == nil {
		err = d.c.collectGarbage(ctx, d.layer, true)
	}
	if err == nil {
		err = d.areGone(ctx, keys)
	}
	if err != nil {
		return errors.Join(refused, err, d.label(ctx, labeled))
	}
	d.done.Snapshots = append(d.done.Snapshots, keys...)
	return nil
}

// withoutRow returns the active keys that leases or containers name and that the
// snapshotter has not, but for those of extractions, which come to nothing. Committed
// names do not count: leases of dead pulls name many that no longer exist.
func (d *drop) withoutRow(ctx context.Context) ([]string, error) {
	keys, err := d.leasedOnly(ctx, func(key string) bool { return !isExtraction(key) && digest.Digest(key).Validate() != nil })
	if err != nil {
		return nil, err
	}
	containers, err := d.c.listContainers(ctx, d.layer.Snapshotter)
	if err != nil {
		return nil, err
	}
	sn := d.c.snapshotter(d.layer)
	for _, container := range containers {
		if _, err := sn.Stat(ctx, container.SnapshotKey); errdefs.IsNotFound(err) {
			keys = append(keys, container.SnapshotKey)
		}
	}
	return keys, nil
}

// areGone is an error unless containerd has none of the snapshots any more.
func (d *drop) areGone(ctx context.Context, keys []string) error {
	sn := d.c.snapshotter(d.layer)
	for _, key := range keys {
		if err := sn.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// unlease takes snapshots out of all leases of the namespace.
func (d *drop) unlease(ctx context.Context, keys []string) error {
	all, err := d.c.leases.List(ctx)
	if err != nil {
		return fmt.Errorf("list leases: %w", err)
	}
	for _, l := range all {
		for _, key := range keys {
			err := d.c.leases.DeleteResource(ctx, l, leases.Resource{ID: key, Type: "snapshots/" + d.layer.Snapshotter})
			if err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("take snapshot %s out of lease %s: %w", key, l.ID, err)
			}
		}
	}
	return nil
}

// unlabel deletes the labels of blobs that keep snapshots, and returns what they were.
// The next unpacking of the image sets them again.
func (d *drop) unlabel(ctx context.Context, keys []string) (were []content.Info, err error) {
	name := snapshotLabel + d.layer.Snapshotter
	if err := d.c.content.Walk(ctx, func(info content.Info) error {
		if slices.Contains(keys, info.Labels[name]) {
			were = append(were, info)
		}
		return nil
	}); err != nil {
		return nil, fmt.Errorf("list blobs: %w", err)
	}
	for _, info := range were {
		info.Labels = map[string]string{name: ""}
		if err := d.label(ctx, []content.Info{info}); err != nil {
			return were, err
		}
	}
	return were, nil
}

// label sets the labels of blobs that keep snapshots.
func (d *drop) label(ctx context.Context, all []content.Info) error {
	for _, info := range all {
		if _, err := d.c.content.Update(ctx, info, "labels."+snapshotLabel+d.layer.Snapshotter); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("label blob %s: %w", info.Digest, err)
		}
	}
	return nil
}

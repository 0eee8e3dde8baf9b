package images

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
)

// leaseFor bounds a lease: after a repair that was cut short, and until the pull of an image
// whose names were deleted; then the daemon deletes it. An image never has a second one.
const leaseFor = time.Hour

// flatLabel keeps a lease from keeping what its blobs refer to (containerd's
// core/metadata/gc.go:101).
const flatLabel = "containerd.io/gc.flat"

// lease leases the good blobs of an image, and its snapshots.
func (c repairer) lease(ctx context.Context, i Image) (leases.Lease, error) {
	lease := leases.Lease{ID: repull.RepairPrefix + c.o.Snapshotter + "-" + i.Target.String()}
	manager := c.view.Leases()
	_, err := manager.Create(ctx, leases.WithID(lease.ID), leases.WithExpiration(leaseFor),
		leases.WithLabel(flatLabel, time.Now().UTC().Format(time.RFC3339)))
	if err != nil && !errdefs.IsAlreadyExists(err) { // an interrupted repair has left it
		return lease, fmt.Errorf("lease blobs and snapshots: %w", err)
	}
	var all []leases.Resource
	for _, d := range append(i.entry.manifest.Parts(), i.Target) {
		bad := slices.ContainsFunc(slices.Concat(i.facts.documents, i.facts.blobs), func(b repull.Blob) bool { return b.Digest == d })
		if _, ok := i.space.lib.Blobs[d]; ok && !bad {
			all = append(all, leases.Resource{ID: d.String(), Type: "content"})
		}
	}
	for _, l := range i.facts.having(LayerReady, LayerDamaged, LayerLost, LayerUnknown) {
		all = append(all, leases.Resource{ID: l.ChainID, Type: "snapshots/" + c.o.Snapshotter})
	}
	for _, r := range all {
		if err := manager.AddResource(ctx, lease, r); err != nil {
			return lease, errors.Join(fmt.Errorf("lease %s: %w", r.ID, err), c.unlease(ctx, lease))
		}
	}
	return lease, nil
}

func (c repairer) unlease(ctx context.Context, lease leases.Lease) error {
	err := c.view.Leases().Delete(context.WithoutCancel(ctx), lease)
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete lease %s: %w", lease.ID, err)
	}
	return nil
}

// unpackAgain removes the snapshots of an image from the lowest that is not ready upwards from
// containerd's records, with those of other images on that layer, and unpacks all of them
// from their blobs. Nothing is removed unless every blob is good that is needed for it: what
// stands on the layer may be whole, and could not be made again.
func (c repairer) unpackAgain(ctx context.Context, i Image, o RepairOptions) (string, error) {
	affected, err := c.sharing(ctx, i)
	if err != nil {
		return "", err
	}
	for _, l := range i.facts.having(LayerDamaged, LayerLost) {
		if err := c.confirm(ctx, i, l, o); err != nil {
			return "", err
		}
	}
	if err := c.removeExited(ctx, i, func() error { return nil }); err != nil {
		return "", err
	}
	lease, err := c.lease(ctx, i)
	if err != nil {
		return "", err
	}
	removed, err := c.removeKeys(ctx, i, affected)
	if err == nil {
		for _, a := range affected {
			if err = c.unpack(leases.WithLease(ctx, lease.ID), a, c.o.Snapshotter); err != nil {
				break
			}
		}
	}
	text := ""
	if err == nil {
		text = "unpacked again"
	}
	if removed > 0 {
		text = strings.TrimSuffix(fmt.Sprintf("removed %s; %s", count(removed, "snapshot"), text), "; ")
	}
	if err != nil {
		return text, err // the lease keeps what is there for the next attempt
	}
	return text, c.unlease(ctx, lease)
}

// sharing returns the image, and those of the same namespace that have its lowest layer that
// is broken. The error names what keeps them from being unpacked again.
func (c repairer) sharing(ctx context.Context, i Image) ([]entry, error) {
	affected := []entry{i.entry}
	if broken := i.facts.having(LayerDamaged, LayerLost); len(broken) > 0 {
		for d, m := range i.space.manifests {
			if d == i.Manifest || d == "" || m.Above(broken[0].ChainID) == nil {
				continue
			}
			stands, err := c.anyOnRecord(ctx, m.Above(broken[0].ChainID)[1:])
			if err != nil {
				return nil, err
			}
			if !stands {
				continue // it was never unpacked, or only up to layers that the image has, too
			}
			doc, err := c.view.Library().ReadManifest(ctx, i.space.lib.Blobs[d])
			if err != nil {
				return nil, err
			}
			affected = append(affected, entry{manifest: m, document: doc, target: d})
		}
	}
	for _, a := range affected {
		if a.document == nil || len(a.layerBlobs()) != len(a.manifest.Chain()) {
			return nil, fmt.Errorf("nothing is removed: manifest %s, whose layers stand on it, is not usable", a.manifest.Digest)
		}
		for n, d := range a.layerBlobs() {
			if l, ok := find(i.facts.layers, a.manifest.Chain()[n]); ok && l.State == LayerReady {
				continue
			}
			flaw, err := c.flaw(ctx, i.space, d, true)
			if err != nil {
				return nil, err
			}
			if flaw != "" {
				return nil, fmt.Errorf("nothing is removed: blob %s of manifest %s, which is needed to unpack again, is %s", d.Digest, a.manifest.Digest, flaw)
			}
		}
	}
	return affected, nil
}

// anyOnRecord reports whether containerd has one of the snapshots on record.
func (c repairer) anyOnRecord(ctx context.Context, names []string) (bool, error) {
	for _, name := range names {
		k, err := c.keyAt(ctx, name)
		if err == nil {
			err = k.err
		}
		if err != nil || k.known {
			return k.known, err
		}
	}
	return false, nil
}

func find(layers []Layer, chainID string) (Layer, bool) {
	n := slices.IndexFunc(layers, func(l Layer) bool { return l.ChainID == chainID })
	if n < 0 {
		return Layer{}, false
	}
	return layers[n], true
}

// removeKeys removes the snapshots from containerd's records, from the top down, so that an
// interruption leaves a chain without a gap.
func (c repairer) removeKeys(ctx context.Context, i Image, affected []entry) (removed int, err error) {
	broken := i.facts.having(LayerDamaged, LayerLost)
	if len(broken) == 0 {
		return 0, nil
	}
	height := map[string]int{}
	for _, a := range affected {
		for n, name := range a.manifest.Above(broken[0].ChainID) {
			height[name] = n
		}
	}
	var keys []string
	for name := range height {
		keys = append(keys, name)
	}
	slices.SortFunc(keys, func(a, b string) int { return cmp.Compare(height[b], height[a]) })
	for _, name := range keys {
		err := c.view.Snapshotter(c.o.Snapshotter).Remove(ctx, name)
		if err != nil && !errdefs.IsNotFound(err) {
			return removed, fmt.Errorf("remove snapshot %s: %w", name, err)
		}
		if err == nil {
			removed++
		}
	}
	return removed, nil
}

// Labels that containerd's unpacker gives to a snapshot (core/unpack/unpacker.go:487).
const (
	labelRef    = "containerd.io/snapshot.ref"
	labelDiffID = "containerd.io/snapshot/diff-id"
)

// Unpack unpacks an image into a snapshotter of containerd's, from the blobs that are on this node.
// What is there already stays.
func (c *Checker) Unpack(ctx context.Context, i Image, snapshotter string) error {
	ctx = namespaces.WithNamespace(ctx, i.Namespace)
	if i.entry.document == nil || len(i.entry.layerBlobs()) != len(i.entry.manifest.Chain()) {
		return fmt.Errorf("the manifest of %s is not usable: pull it", i.Name)
	}
	re := repairer{c}
	lease, err := re.lease(ctx, i)
	if err != nil {
		return err
	}
	err = re.unpack(leases.WithLease(ctx, lease.ID), i.entry, snapshotter)
	return errors.Join(err, re.unlease(ctx, lease))
}

// unpack unpacks the layers of an image that containerd does not have, as containerd's own
// unpacker does, one after the other.
func (c repairer) unpack(ctx context.Context, e entry, snapshotter string) error {
	chain, parent, sn := e.manifest.Chain(), "", c.view.Snapshotter(snapshotter)
	for n, d := range e.layerBlobs() {
		if err := c.unpackLayer(ctx, sn, d, e.manifest.DiffIDs[n], chain[n], parent); err != nil {
			return fmt.Errorf("unpack layer %s: %w", short(chain[n]), err)
		}
		parent = chain[n]
	}
	// From now on the config keeps the chain.
	name := "containerd.io/gc.ref.snapshot." + snapshotter
	_, err := c.view.Content().Update(ctx, content.Info{Digest: e.manifest.Config, Labels: map[string]string{name: parent}}, "labels."+name)
	return err
}

func (c repairer) unpackLayer(ctx context.Context, sn snapshots.Snapshotter, blob ocispec.Descriptor, diffID digest.Digest, name, parent string) (err error) {
	with := snapshots.WithLabels(map[string]string{labelRef: name, labelDiffID: diffID.String()})
	key := fmt.Sprintf(snapshots.UnpackKeyFormat, fmt.Sprintf("%d-%s", time.Now().UnixNano(), rand.Text()[:4]), name)
	mounts, err := sn.Prepare(ctx, key, parent, with)
	if errdefs.IsAlreadyExists(err) {
		return nil // containerd has it, and has added it to the lease
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			if gone := sn.Remove(context.WithoutCancel(ctx), key); gone != nil && !errdefs.IsNotFound(gone) {
				err = errors.Join(err, gone)
			}
		}
	}()
	got, err := c.view.Apply(ctx, blob, mounts)
	if err != nil {
		return err
	}
	if got != diffID {
		return fmt.Errorf("blob %s holds %s, and not %s", blob.Digest, got, diffID)
	}
	if err := sn.Commit(ctx, name, key, with); err != nil {
		if !errdefs.IsAlreadyExists(err) {
			return err
		}
		if err := sn.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	_, err = c.view.Content().Update(ctx, content.Info{
		Digest: blob.Digest, Labels: map[string]string{labels.LabelUncompressed: diffID.String()},
	}, "labels."+labels.LabelUncompressed)
	return err
}

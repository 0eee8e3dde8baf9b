package images

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
)

// Rows are the snapshots that the snapshotter itself has, under its own names,
// <namespace>/<number>/<key>. containerd cannot be asked for them: its list ends at
// the first snapshot that Stat has an error for.
type Rows interface {
	Walk(ctx context.Context, f snapshots.WalkFunc, filters ...string) error
}

// plan is what Drop is about to do.
type plan struct {
	images  []*imagesapi.Image
	keep    []digest.Digest // good blobs of those images
	below   []string        // names of their snapshots under the damaged one
	bad     []Blob
	keys    []string // of snapshots that go, the damaged one among them
	holders []holder

	contentRoot string
}

// row is a snapshot of the snapshotter in the layer's namespace.
type row struct {
	name, parent, key string
	kind              snapshots.Kind
}

// readRows returns the snapshots of a namespace by their names.
func readRows(ctx context.Context, from Rows, namespace string) (map[string]row, error) {
	rows := map[string]row{}
	if from == nil {
		return rows, nil
	}
	err := from.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		// The key may have slashes of its own.
		if part := strings.SplitN(info.Name, "/", 3); len(part) == 3 && part[0] == namespace {
			rows[info.Name] = row{info.Name, info.Parent, part[2], info.Kind}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	return rows, nil
}

// onTop returns the rows that stand on one whose key is name, that one among them.
func onTop(rows map[string]row, name string) []row {
	stands := map[string]bool{}
	var look func(string) bool
	look = func(n string) bool {
		r, ok := rows[n]
		if !ok {
			return false
		}
		if done, ok := stands[n]; ok {
			return done
		}
		stands[n] = r.kind == snapshots.KindCommitted && r.key == name || look(r.parent)
		return stands[n]
	}
	var all []row
	for _, n := range slices.Sorted(maps.Keys(rows)) {
		if look(n) {
			all = append(all, rows[n])
		}
	}
	return all
}

// look finds out what there is to do. It changes nothing. What stands on the layer
// is found both in the snapshotter's rows and in the images: rows may have been
// lost, and the config of an image may be.
func (c *Containerd) look(ctx context.Context, layer Layer, o Options) (*plan, error) {
	name := layer.ChainID.String()
	rows, err := readRows(ctx, o.Rows, layer.Namespace)
	if err != nil {
		return nil, err
	}
	l, err := c.readLibrary(ctx, layer.Snapshotter)
	if err != nil {
		return nil, err
	}
	top := onTop(rows, name)
	keys := map[string]bool{name: true}
	for _, r := range top {
		if r.kind == snapshots.KindCommitted || isExtraction(r.key) {
			keys[r.key] = true
		}
	}
	affected, parts, own := map[digest.Digest]bool{}, map[digest.Digest]bool{}, map[digest.Digest]bool{}
	below := map[string]bool{}
	for _, m := range l.manifests {
		above := m.above(name)
		if m.unpacked == "" || above == nil && !keys[m.unpacked] {
			continue
		}
		affected[m.digest] = true
		for _, d := range m.parts() {
			parts[d] = true
		}
		for _, k := range above {
			keys[k] = true
		}
		for _, k := range m.below(name) {
			below[k] = true
		}
		if i := len(m.below(name)); above != nil && i < len(m.layers) {
			own[m.layers[i]] = true
		}
	}
	p := &plan{contentRoot: o.ContentRoot, keys: slices.Sorted(maps.Keys(keys)), below: slices.Sorted(maps.Keys(below))}
	if err := c.lookImages(ctx, l, affected, parts, p); err != nil {
		return nil, err
	}
	if p.holders, err = c.lookHolders(ctx, layer, top, keys); err != nil {
		return nil, err
	}
	if len(p.holders) > 0 {
		// No more than what the layer can be healed from: without the manifest
		// the other blobs would be collected as garbage.
		if parts = own; !o.BlobsOfHeld {
			parts = nil
		}
	}
	return p, c.lookBlobs(ctx, l, parts, p)
}

// isExtraction tells whether a key is of a layer being unpacked. On top of a
// damaged layer it comes to nothing, and may be in the way until its lease ends.
func isExtraction(key string) bool {
	return strings.HasPrefix(key, snapshots.UnpackKeyPrefix+"-")
}

// lookImages finds the images whose names lead to affected manifests, and adds the
// indexes on the way to their parts.
func (c *Containerd) lookImages(ctx context.Context, l *library, affected, parts map[digest.Digest]bool, p *plan) error {
	all, err := c.listImages(ctx)
	if err != nil {
		return err
	}
	for _, i := range all {
		way, ok := l.leadsTo(target(i), affected)
		if !ok {
			continue
		}
		p.images = append(p.images, i)
		for _, d := range way {
			parts[d] = true
		}
	}
	return nil
}

// lookBlobs reads the blobs of the affected images.
func (c *Containerd) lookBlobs(ctx context.Context, l *library, parts map[digest.Digest]bool, p *plan) error {
	for _, d := range slices.Sorted(maps.Keys(parts)) {
		info, ok := l.blobs[d]
		if !ok {
			continue // never fetched, or gone already: the pull fetches it
		}
		flaw, err := c.flaw(ctx, info, p.contentRoot)
		if err != nil {
			return err
		}
		if flaw == "" {
			p.keep = append(p.keep, d)
		} else {
			p.bad = append(p.bad, Blob{d, info.Size, flaw})
		}
	}
	return nil
}

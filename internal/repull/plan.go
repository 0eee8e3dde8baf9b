package repull

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/internal/library"
)

// Rows are the snapshots that the snapshotter itself has, under its own names,
// <namespace>/<number>/<key>. containerd cannot list them: its list ends at
// the first snapshot that Stat has an error for.
type Rows interface {
	Walk(ctx context.Context, f snapshots.WalkFunc, filters ...string) error
}

// plan is what Drop is about to do.
type plan struct {
	images  []image
	names   int             // of images, that are not deleted yet
	keep    []digest.Digest // good blobs of those images
	below   []string        // names of their snapshots under the damaged one
	bad     []Blob
	lacking []digest.Digest // blobs of the damaged layer that containerd has no record of
	lease   leases.Lease    // of keep
	leased  bool            // this Drop has made it
	above   []string        // keys of the snapshots on the damaged one
	holders []holder

	contentRoot string // containerd's
}

// image is a name that goes. A Drop that is cut short is begun again, and has to find
// the names that are left, by what leads from them to the layer. When that is bad, or
// when only snapshots on the layer show that the image has it, their removal would hide
// the name from the next plan: so it is deleted earlier.
type image struct {
	*imagesapi.Image
	documents []digest.Digest // that lead to the layer; none when only snapshots do
	early     bool
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
	var isOn func(string) bool
	isOn = func(n string) bool {
		r, ok := rows[n]
		if !ok {
			return false
		}
		if done, ok := stands[n]; ok {
			return done
		}
		stands[n] = r.kind == snapshots.KindCommitted && r.key == name || isOn(r.parent)
		return stands[n]
	}
	var all []row
	for _, n := range slices.Sorted(maps.Keys(rows)) {
		if isOn(n) {
			all = append(all, rows[n])
		}
	}
	return all
}

// plan determines what a drop of the layer has to do. It changes nothing. What stands on
// the layer is found both in the snapshotter's rows and in the images: rows may have been
// lost, and the config of an image may be.
func (c *Containerd) plan(ctx context.Context, layer Layer, o Options) (*plan, error) {
	name := layer.ChainID.String()
	rows, err := readRows(ctx, o.Rows, layer.Namespace)
	if err != nil {
		return nil, err
	}
	l, err := c.lib.Read(ctx, layer.Snapshotter)
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
	root, err := c.contentRoot(ctx)
	if err != nil {
		return nil, err
	}
	if err := c.evidence(ctx, layer, l, keys, root, o.ContentRoot); err != nil {
		return nil, err
	}
	affected, parts, own := map[digest.Digest]bool{}, map[digest.Digest]bool{}, map[digest.Digest]bool{}
	documents := map[digest.Digest][]digest.Digest{} // of affected manifests whose chain has the layer
	below := map[string]bool{}
	for _, m := range l.Manifests {
		above := m.Above(name)
		if m.Unpacked == "" || above == nil && !keys[m.Unpacked] {
			continue
		}
		id := cmp.Or(m.Digest, m.Config)
		affected[id] = true
		if above != nil {
			documents[id] = m.Documents()
		}
		for _, d := range m.Parts() {
			parts[d] = true
		}
		for _, k := range above {
			keys[k] = true
		}
		for _, k := range m.Below(name) {
			below[k] = true
		}
		if d := m.Layer(name); d != "" {
			own[d] = true
		}
	}
	p := &plan{contentRoot: root, below: slices.Sorted(maps.Keys(below))}
	for _, d := range slices.Sorted(maps.Keys(own)) {
		if _, ok := l.Blobs[d]; !ok {
			p.lacking = append(p.lacking, d)
		}
	}
	if err := c.planImages(ctx, l, affected, documents, parts, p); err != nil {
		return nil, err
	}
	if p.holders, err = c.findHolders(ctx, layer, top, keys); err != nil {
		return nil, err
	}
	if len(p.holders) > 0 {
		// No more than what the layer can be healed from: without the manifest
		// the other blobs would be collected as garbage.
		if parts = own; !o.BlobsOfHeld {
			parts = nil
		}
	}
	delete(keys, name)
	p.above = slices.Sorted(maps.Keys(keys))
	return p, c.planBlobs(ctx, l, parts, p)
}

// isExtraction reports whether a key is of a layer being unpacked. On top of a
// damaged layer it comes to nothing, and may be in the way until its lease ends.
func isExtraction(key string) bool {
	return strings.HasPrefix(key, snapshots.UnpackKeyPrefix+"-")
}

// planImages finds the images whose names lead to affected manifests, and adds the
// indexes on the way to their parts.
func (c *Containerd) planImages(ctx context.Context, l *library.Library, affected map[digest.Digest]bool, documents map[digest.Digest][]digest.Digest, parts map[digest.Digest]bool, p *plan) error {
	all, err := c.listImages(ctx)
	if err != nil {
		return err
	}
	for _, i := range all {
		way, ok := l.LeadsTo(target(i), affected)
		if !ok {
			continue
		}
		found := image{Image: i}
		if more := documents[way[0]]; more != nil {
			found.documents = slices.Concat(way, more)
		}
		p.images = append(p.images, found)
		for _, d := range way {
			parts[d] = true
		}
	}
	p.names = len(p.images)
	return nil
}

// planBlobs reads the blobs of the affected images, and decides which names go early.
func (c *Containerd) planBlobs(ctx context.Context, l *library.Library, parts map[digest.Digest]bool, p *plan) error {
	for _, d := range slices.Sorted(maps.Keys(parts)) {
		at, info, err := c.record(ctx, l, d)
		if errdefs.IsNotFound(err) {
			continue // never fetched, or gone already: the pull fetches it
		}
		if err != nil {
			return err
		}
		flaw, err := c.lib.Flaw(at, info, p.contentRoot)
		if err != nil {
			return err
		}
		switch _, own := l.Blobs[d]; {
		case flaw == "" && own:
			p.keep = append(p.keep, d)
		case flaw != "":
			p.bad = append(p.bad, Blob{d, info.Size, flaw})
		}
	}
	for i := range p.images {
		documents := p.images[i].documents
		p.images[i].early = documents == nil || slices.ContainsFunc(p.bad, func(b Blob) bool { return slices.Contains(documents, b.Digest) })
	}
	return nil
}

// record returns what containerd has on record of a blob, and a context of a namespace
// that has it: that of l, or else any. A pull in the one takes the file of the other.
func (c *Containerd) record(ctx context.Context, l *library.Library, d digest.Digest) (context.Context, content.Info, error) {
	if info, ok := l.Blobs[d]; ok {
		return ctx, info, nil
	}
	all, err := c.listNamespaces(ctx)
	if err != nil {
		return ctx, content.Info{}, err
	}
	for _, ns := range all {
		at := namespaces.WithNamespace(ctx, ns)
		info, err := c.content.Info(at, d)
		if !errdefs.IsNotFound(err) {
			return at, info, err
		}
	}
	return ctx, content.Info{}, errdefs.ErrNotFound
}

func target(i *imagesapi.Image) digest.Digest { return digest.Digest(i.GetTarget().GetDigest()) }

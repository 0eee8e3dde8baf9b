package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/containerd/v2/core/content"
	containerdimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/internal/library"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
)

// space is what one namespace of containerd has, and the snapshotter's rows of it.
type space struct {
	name       string
	lib        *library.Library
	entries    []entry
	keys       map[string]key // by chain ID
	containers []repull.Container
	downloads  []content.Status
	manifests  map[digest.Digest]library.Manifest

	rows      map[string]Row   // by their names
	committed map[string][]Row // by chain ID
}

// entry is an image for one platform, before it is examined.
type entry struct {
	records   []*imagesapi.Image // the names that lead to it
	target    digest.Digest
	platform  string
	manifest  library.Manifest  // without a config when nothing leads to one
	document  *ocispec.Manifest // nil when the manifest is missing or bad
	documents []repull.Blob     // missing or bad ones on the way to the layers
	unclear   error             // what kept a document from being read
}

// layerBlobs are the descriptors of its layers, lowest first. Without the manifest they
// have no media types.
func (e entry) layerBlobs() (all []ocispec.Descriptor) {
	if e.document == nil {
		for _, d := range e.manifest.Layers() {
			all = append(all, ocispec.Descriptor{Digest: d})
		}
		return all
	}
	for _, d := range e.document.Layers {
		if containerdimages.IsLayerType(d.MediaType) {
			all = append(all, d)
		}
	}
	return all
}

// key is what containerd has on record of a chain ID.
type key struct {
	known bool
	lost  bool  // it is known, and the snapshotter does not have it
	err   error // nothing is known
}

// findRoot finds the directory of the content store, unless it is not visible from here.
func (c *Checker) findRoot(ctx context.Context) (err error) {
	if c.root, err = c.view.ContentRoot(ctx); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(c.root, "blobs")); err != nil {
		c.root = ""
	}
	return nil
}

// read reads what containerd has of the selected images in the namespace of ctx, or of those
// of only.
func (c *Checker) read(ctx context.Context, namespace string, only map[place]bool) (s *space, err error) {
	s = &space{name: namespace, keys: map[string]key{}, manifests: map[digest.Digest]library.Manifest{}}
	records, err := c.view.Images(ctx)
	if err != nil {
		return nil, err
	}
	targets, order := map[digest.Digest][]*imagesapi.Image{}, []digest.Digest{}
	for _, r := range records {
		d := digest.Digest(r.GetTarget().GetDigest())
		if targets[d] == nil {
			order = append(order, d)
		}
		targets[d] = append(targets[d], r)
	}
	if len(order) == 0 {
		return s, nil
	}
	if s.lib, err = c.view.Library().Read(ctx, c.o.Snapshotter); err != nil {
		return nil, err
	}
	for _, m := range s.lib.Manifests {
		s.manifests[m.Digest] = m
	}
	if s.downloads, err = c.view.Content().ListStatuses(ctx); err != nil {
		return nil, fmt.Errorf("list downloads: %w", err)
	}
	if s.containers, err = c.view.Containers(ctx, c.o.Snapshotter); err != nil {
		return nil, err
	}
	for _, d := range order {
		if only != nil && !only[place{namespace, d}] {
			continue
		}
		found, err := c.entries(ctx, s, targets[d], d)
		if err != nil {
			return nil, err
		}
		for _, e := range found {
			if !c.selected(e) {
				continue
			}
			s.entries = append(s.entries, e)
			if err := c.probe(ctx, s, e.manifest.Chain()); err != nil {
				return nil, err
			}
		}
	}
	return s, nil
}

func (c *Checker) selected(e entry) bool {
	if len(c.o.Names) == 0 {
		return true
	}
	i := Image{Target: e.target, Manifest: e.manifest.Digest}
	for _, r := range e.records {
		i.Names = append(i.Names, r.Name)
	}
	return slices.ContainsFunc(c.o.Names, i.called)
}

// entries finds the images that a name leads to, one for each platform that is here. When
// there is none, there is one entry without a manifest.
func (c *Checker) entries(ctx context.Context, s *space, records []*imagesapi.Image, target digest.Digest) ([]entry, error) {
	w := walker{c: c, s: s, seen: map[digest.Digest]bool{}}
	size := records[0].GetTarget().GetSize()
	if err := w.follow(ctx, ocispec.Descriptor{Digest: target, Size: size}, true); err != nil {
		return nil, err
	}
	if len(w.found) == 0 {
		if len(w.bad) == 0 && w.unclear == nil {
			w.unclear = errors.New("no manifest of any platform is here, and none is named by labels")
		}
		w.found = []entry{{}}
	}
	for i := range w.found {
		w.found[i].records, w.found[i].target = records, target
		w.found[i].documents = append(slices.Clone(w.bad), w.found[i].documents...)
		w.found[i].unclear = errors.Join(w.unclear, w.found[i].unclear)
	}
	return w.found, nil
}

// walker follows an image's name to its manifests.
type walker struct {
	c       *Checker
	s       *space
	seen    map[digest.Digest]bool
	found   []entry
	bad     []repull.Blob // indexes
	unclear error
}

// follow reads an index or a manifest. What an index names and containerd has no record of
// is an image for another platform, or an attestation, which a pull leaves out; required is
// false for those.
func (w *walker) follow(ctx context.Context, desc ocispec.Descriptor, required bool) error {
	if w.seen[desc.Digest] {
		return nil
	}
	w.seen[desc.Digest] = true
	info, ok := w.s.lib.Blobs[desc.Digest]
	if !ok {
		if required {
			w.bad = append(w.bad, repull.Blob{Digest: desc.Digest, Size: desc.Size, Flaw: library.Missing})
		}
		return nil
	}
	body, flaw, err := w.c.view.Library().Document(ctx, info, w.c.root)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var doc struct {
		ocispec.Manifest
		Manifests []ocispec.Descriptor
	}
	if err == nil && flaw == "" && json.Unmarshal(body, &doc) != nil {
		err = fmt.Errorf("blob %s is neither an index nor a manifest", desc.Digest)
	}
	m, isManifest := w.s.manifests[desc.Digest]
	switch {
	case (err != nil || flaw != "") && isManifest:
		e := entry{manifest: m, platform: platformOf(desc.Platform), unclear: err}
		if flaw != "" {
			e.documents = []repull.Blob{{Digest: desc.Digest, Size: info.Size, Flaw: flaw}}
		}
		return w.config(ctx, e)
	case err != nil || flaw != "":
		w.unclear = errors.Join(w.unclear, err)
		if flaw != "" {
			w.bad = append(w.bad, repull.Blob{Digest: desc.Digest, Size: info.Size, Flaw: flaw})
		}
		for _, d := range w.s.lib.Children(desc.Digest) {
			if err := w.follow(ctx, ocispec.Descriptor{Digest: d}, false); err != nil {
				return err
			}
		}
		return nil
	case len(doc.Manifests) > 0:
		for _, child := range doc.Manifests {
			if isAttestation(child) {
				continue
			}
			if err := w.follow(ctx, child, false); err != nil {
				return err
			}
		}
		return nil
	}
	if !isManifest {
		m = library.Manifest{Digest: desc.Digest, Config: doc.Config.Digest}
	}
	return w.config(ctx, entry{manifest: m, document: &doc.Manifest, platform: platformOf(desc.Platform)})
}

// config adds an entry, with what is wrong with its config.
func (w *walker) config(ctx context.Context, e entry) error {
	size := int64(0)
	if e.document != nil {
		size = e.document.Config.Size
	}
	info, ok := w.s.lib.Blobs[e.manifest.Config]
	if !ok {
		e.documents = append(e.documents, repull.Blob{Digest: e.manifest.Config, Size: size, Flaw: library.Missing})
		w.found = append(w.found, e)
		return nil
	}
	body, flaw, err := w.c.view.Library().Document(ctx, info, w.c.root)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if flaw != "" {
		e.documents = append(e.documents, repull.Blob{Digest: info.Digest, Size: info.Size, Flaw: flaw})
	}
	e.unclear = errors.Join(e.unclear, err)
	var config ocispec.Image
	if flaw == "" && err == nil && json.Unmarshal(body, &config) == nil && config.OS != "" {
		e.platform = platformOf(&config.Platform)
	}
	w.found = append(w.found, e)
	return nil
}

// isAttestation reports whether an entry of an index is about another entry, and no image.
func isAttestation(d ocispec.Descriptor) bool {
	return d.Annotations["vnd.docker.reference.type"] != "" || d.Platform != nil && d.Platform.OS == "unknown"
}

func platformOf(p *ocispec.Platform) string {
	if p == nil || p.OS == "" {
		return ""
	}
	return strings.TrimSuffix(p.OS+"/"+p.Architecture+"/"+p.Variant, "/")
}

// probe determines what containerd has on record of chain IDs. The error is that of ctx.
func (c *Checker) probe(ctx context.Context, s *space, chain []string) error {
	for _, name := range chain {
		if _, done := s.keys[name]; done {
			continue
		}
		k, err := c.keyAt(ctx, name)
		if err != nil {
			return err
		}
		s.keys[name] = k
	}
	return nil
}

func (c *Checker) keyAt(ctx context.Context, chainID string) (key, error) {
	_, err := c.view.Snapshotter(c.o.Snapshotter).Usage(ctx, chainID)
	switch {
	case ctx.Err() != nil:
		return key{}, ctx.Err()
	case err == nil:
		return key{known: true}, nil
	case lacks(err, chainID):
		return key{}, nil
	case errdefs.IsNotFound(err):
		return key{known: true, lost: true}, nil
	}
	return key{err: fmt.Errorf("snapshot %s: %w", short(chainID), err)}, nil
}

// lacks reports whether an error means that containerd itself has no record of a key. The
// snapshotter's own answer, which containerd passes on, does not name containerd's key:
// containerd calls it with <namespace>/<number>/<key> (core/metadata/snapshot.go, resolveKey).
func lacks(err error, chainID string) bool {
	return errdefs.IsNotFound(err) && strings.Contains(err.Error(), "snapshot "+chainID+" does not exist")
}

// take sorts the snapshotter's rows.
func (s *space) take(rows []Row) {
	s.rows, s.committed = map[string]Row{}, map[string][]Row{}
	for _, r := range rows {
		part := strings.SplitN(r.Name, "/", 3)
		if len(part) < 3 || part[0] != s.name {
			continue
		}
		s.rows[r.Name] = r
		if r.Committed {
			s.committed[part[2]] = append(s.committed[part[2]], r)
		}
	}
}

// keyOf is containerd's key of a row.
func keyOf(r Row) string {
	part := strings.SplitN(r.Name, "/", 3)
	return part[len(part)-1]
}

// isExtraction reports whether a row is of a layer being unpacked, and of which.
func isExtraction(r Row) (chainID string, ok bool) {
	if r.Committed || !strings.HasPrefix(keyOf(r), snapshots.UnpackKeyPrefix+"-") {
		return "", false
	}
	_, chainID, ok = strings.Cut(keyOf(r), " ")
	return chainID, ok
}

package library

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Labels that containerd gives the rows of blobs when it pulls. They have in its
// database what the blobs have in their JSON, and are there when a file is not.
const (
	refContent  = "containerd.io/gc.ref.content."
	refConfig   = refContent + "config"
	refLayer    = refContent + "l."
	refSnapshot = "containerd.io/gc.ref.snapshot."
)

// Store reads a containerd's content store through its API. A call reads in the namespace of
// its context.
type Store struct{ content content.Store }

// NewStore returns a Store that reads from a containerd.
func NewStore(c content.Store) Store { return Store{c} }

// Library is what the content store has of the images in one namespace: all blobs that
// the namespace has on record, and the images that they make up.
type Library struct {
	Namespace string
	Blobs     map[digest.Digest]content.Info
	Manifests []Manifest
}

// Manifest is an image for one platform.
type Manifest struct {
	Digest, Config digest.Digest   // Digest is "" when only the config is left
	layers         []digest.Digest // lowest first; none when nothing names them
	DiffIDs        []digest.Digest // likewise
	chain          []string        // names of the snapshots, lowest first, as many as diff IDs
	Unpacked       string          // name of the top snapshot in our snapshotter; none when never unpacked there
}

// Parts are the blobs of the manifest.
func (m Manifest) Parts() []digest.Digest {
	all := m.Documents()
	return append(all, m.layers...)
}

// Chain returns the names of its snapshots, lowest first; none when neither its config nor
// labels show them. The caller must not change it.
func (m Manifest) Chain() []string { return m.chain }

// Layers returns the digests of its layer blobs, lowest first. The caller must not change it.
func (m Manifest) Layers() []digest.Digest { return m.layers }

// Documents are the blobs that lead to its layers.
func (m Manifest) Documents() []digest.Digest {
	if m.Digest == "" {
		return []digest.Digest{m.Config}
	}
	return []digest.Digest{m.Digest, m.Config}
}

// Layer returns the blob of a snapshot, "" when it is not known.
func (m Manifest) Layer(name string) digest.Digest {
	if i := slices.Index(m.chain, name); i >= 0 && len(m.layers) == len(m.chain) {
		return m.layers[i]
	}
	return ""
}

// Read reads what the namespace of ctx has. snapshotter is the name under which containerd
// knows the snapshotter that images are unpacked in. Contents are read of manifests and
// configs only.
func (s Store) Read(ctx context.Context, snapshotter string) (*Library, error) {
	l := &Library{Blobs: map[digest.Digest]content.Info{}}
	l.Namespace, _ = namespaces.Namespace(ctx)
	err := s.content.Walk(ctx, func(info content.Info) error {
		l.Blobs[info.Digest] = info
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list blobs: %w", err)
	}
	used := map[digest.Digest]bool{}
	for d, info := range l.Blobs {
		m, err := s.manifestOf(ctx, info)
		if err != nil {
			return nil, err
		}
		if m.Config == "" {
			continue
		}
		m.Digest, used[m.Config] = d, true
		l.Manifests = append(l.Manifests, m)
	}
	// Those whose manifest is gone, or cannot be read and has no such labels.
	for d, info := range l.Blobs {
		if info.Labels[refSnapshot+snapshotter] != "" && !used[d] {
			l.Manifests = append(l.Manifests, Manifest{Config: d})
		}
	}
	for i := range l.Manifests {
		m := &l.Manifests[i]
		m.Unpacked = l.Blobs[m.Config].Labels[refSnapshot+snapshotter]
		if m.DiffIDs, err = s.diffIDs(ctx, l, *m); err != nil {
			return nil, err
		}
		for _, id := range identity.ChainIDs(slices.Clone(m.DiffIDs)) {
			m.chain = append(m.chain, id.String())
		}
	}
	return l, nil
}

// manifestOf makes a manifest out of a blob; without a config it is none. The labels
// that containerd's pull gives have all of it. With discard_unpacked_layers they do not name
// the layers, and nerdctl and BuildKit number all children alike
// (containerd.io/gc.ref.content.0 is the config): then the content is read.
func (s Store) manifestOf(ctx context.Context, info content.Info) (Manifest, error) {
	m := Manifest{Config: digest.Digest(info.Labels[refConfig]), layers: layersOf(info)}
	if m.Config.Validate() != nil {
		m.Config = ""
	}
	if m.Config != "" && len(m.layers) > 0 {
		return m, nil
	}
	refers := false
	for label := range info.Labels {
		child, ok := strings.CutPrefix(label, refContent)
		refers = refers || ok && !strings.HasPrefix(child, "m.") // which indexes have
	}
	if !refers {
		return m, nil
	}
	doc, err := s.ReadManifest(ctx, info)
	if err != nil || doc == nil {
		return m, err
	}
	m.Config, m.layers = doc.Config.Digest, nil
	for _, l := range doc.Layers {
		if images.IsLayerType(l.MediaType) {
			m.layers = append(m.layers, l.Digest)
		}
	}
	return m, nil
}

// ReadManifest returns the content of a manifest, nil when it is none, or bad. containerd
// stores what a client sends: what stands in the place of a digest need not be one.
func (s Store) ReadManifest(ctx context.Context, info content.Info) (*ocispec.Manifest, error) {
	body, flaw, err := s.read(ctx, info, maxConfig)
	if err != nil || flaw != "" {
		return nil, err
	}
	var doc struct {
		ocispec.Manifest
		Manifests json.RawMessage // of an index
	}
	if json.Unmarshal(body, &doc) != nil || len(doc.Manifests) > 0 || doc.Config.Digest.Validate() != nil {
		return nil, nil
	}
	for _, l := range doc.Layers {
		if l.Digest.Validate() != nil {
			return nil, nil
		}
	}
	return &doc.Manifest, nil
}

func layersOf(manifest content.Info) []digest.Digest {
	numbered := map[int]digest.Digest{}
	for label, value := range manifest.Labels {
		if n, ok := strings.CutPrefix(label, refLayer); ok {
			if i, err := strconv.Atoi(n); err == nil {
				numbered[i] = digest.Digest(value)
			}
		}
	}
	var layers []digest.Digest
	for i := range len(numbered) {
		d, ok := numbered[i]
		// containerd copies what is in a manifest into labels, also out of a file that
		// is damaged.
		if !ok || d.Validate() != nil {
			return nil
		}
		layers = append(layers, d)
	}
	return layers
}

// diffIDs are those of a manifest's layers: from the config, or, when that cannot be
// trusted, from the labels that layers get when they are unpacked.
func (s Store) diffIDs(ctx context.Context, l *Library, m Manifest) ([]digest.Digest, error) {
	if info, ok := l.Blobs[m.Config]; ok {
		body, flaw, err := s.read(ctx, info, maxConfig)
		if err != nil {
			return nil, err
		}
		var config ocispec.Image
		if flaw == "" && json.Unmarshal(body, &config) == nil && valid(config.RootFS.DiffIDs) {
			return config.RootFS.DiffIDs, nil
		}
	}
	var diffIDs []digest.Digest
	for _, layer := range m.layers {
		diffIDs = append(diffIDs, digest.Digest(l.Blobs[layer].Labels[labels.LabelUncompressed]))
	}
	if !valid(diffIDs) {
		return nil, nil
	}
	return diffIDs, nil
}

// valid reports whether there are diff IDs, and all are digests.
func valid(diffIDs []digest.Digest) bool {
	return len(diffIDs) > 0 && !slices.ContainsFunc(diffIDs, func(d digest.Digest) bool { return d.Validate() != nil })
}

// Above is the part of a manifest's chain from name upwards.
func (m Manifest) Above(name string) []string {
	if i := slices.Index(m.chain, name); i >= 0 {
		return m.chain[i:]
	}
	return nil
}

// Below is the part of a manifest's chain under name.
func (m Manifest) Below(name string) []string {
	return m.chain[:max(0, slices.Index(m.chain, name))]
}

// LeadsTo reports whether the blob from, or one it refers to, is one of to, and
// which blobs lie on the way: an index, or an index of indexes.
func (l *Library) LeadsTo(from digest.Digest, to map[digest.Digest]bool) (way []digest.Digest, ok bool) {
	return l.follow(from, to, nil)
}

func (l *Library) follow(from digest.Digest, to map[digest.Digest]bool, seen []digest.Digest) ([]digest.Digest, bool) {
	if to[from] {
		return []digest.Digest{from}, true
	}
	if slices.Contains(seen, from) {
		return nil, false
	}
	for label, child := range l.Blobs[from].Labels {
		if !strings.HasPrefix(label, refContent) {
			continue
		}
		if way, ok := l.follow(digest.Digest(child), to, append(seen, from)); ok {
			return append(way, from), true
		}
	}
	return nil, false
}

// Children are the blobs that a blob refers to, as far as containerd's labels show it.
func (l *Library) Children(of digest.Digest) (all []digest.Digest) {
	for label, child := range l.Blobs[of].Labels {
		if d := digest.Digest(child); strings.HasPrefix(label, refContent) && d.Validate() == nil {
			all = append(all, d)
		}
	}
	slices.Sort(all)
	return all
}

// Unpackers maps the snapshotters in which containerd has unpacked the image of a config,
// as labels have it, to the names of the top snapshots. A snapshot may be gone since.
func (l *Library) Unpackers(config digest.Digest) map[string]string {
	found := map[string]string{}
	for label, top := range l.Blobs[config].Labels {
		if name, ok := strings.CutPrefix(label, refSnapshot); ok && top != "" {
			found[name] = top
		}
	}
	return found
}

// Sources are the registries that a blob came from, as containerd's labels have it, sorted.
func (l *Library) Sources(of digest.Digest) (hosts []string) {
	for label := range l.Blobs[of].Labels {
		if host, ok := strings.CutPrefix(label, labels.LabelDistributionSource+"."); ok {
			hosts = append(hosts, host)
		}
	}
	slices.Sort(hosts)
	return hosts
}

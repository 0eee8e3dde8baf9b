package images

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Labels that containerd gives the rows of blobs when it pulls. They say in its
// database what the blobs say in their JSON, and are there when a file is not.
const (
	refContent  = "containerd.io/gc.ref.content."
	refConfig   = refContent + "config"
	refLayer    = refContent + "l."
	refSnapshot = "containerd.io/gc.ref.snapshot."
)

// library is what the content store has of the images in one namespace.
type library struct {
	blobs     map[digest.Digest]content.Info
	manifests []manifest
}

// manifest is an image for one platform.
type manifest struct {
	digest, config digest.Digest
	layers         []digest.Digest // lowest first; none when layers are discarded after unpacking
	chain          []string        // names of the snapshots, lowest first; none when nothing tells them
	unpacked       string          // name of the top snapshot in our snapshotter; none when never unpacked there
}

// parts are the blobs of the manifest.
func (m manifest) parts() []digest.Digest {
	return append([]digest.Digest{m.digest, m.config}, m.layers...)
}

// readLibrary reads what a namespace has. Contents are read of configs only.
func (c *Containerd) readLibrary(ctx context.Context, snapshotter string) (*library, error) {
	l := &library{blobs: map[digest.Digest]content.Info{}}
	err := c.content.Walk(ctx, func(info content.Info) error {
		l.blobs[info.Digest] = info
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list blobs: %w", err)
	}
	for d, info := range l.blobs {
		config := info.Labels[refConfig]
		if config == "" {
			continue
		}
		m := manifest{digest: d, config: digest.Digest(config), layers: layersOf(info)}
		m.unpacked = l.blobs[m.config].Labels[refSnapshot+snapshotter]
		if m.chain, err = c.chain(ctx, l, m); err != nil {
			return nil, err
		}
		l.manifests = append(l.manifests, m)
	}
	return l, nil
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
		if !ok {
			return nil
		}
		layers = append(layers, d)
	}
	return layers
}

// chain is the names of a manifest's snapshots: from the config, or, when that
// cannot be trusted, from the labels that layers get when they are unpacked.
func (c *Containerd) chain(ctx context.Context, l *library, m manifest) ([]string, error) {
	var diffIDs []digest.Digest
	if info, ok := l.blobs[m.config]; ok {
		body, flaw, err := c.read(ctx, info, maxConfig)
		if err != nil {
			return nil, err
		}
		var config ocispec.Image
		if flaw == "" && json.Unmarshal(body, &config) == nil {
			diffIDs = config.RootFS.DiffIDs
		}
	}
	if len(diffIDs) == 0 {
		for _, layer := range m.layers {
			id := l.blobs[layer].Labels[labels.LabelUncompressed]
			if id == "" {
				return nil, nil
			}
			diffIDs = append(diffIDs, digest.Digest(id))
		}
	}
	var names []string
	for _, id := range identity.ChainIDs(slices.Clone(diffIDs)) {
		names = append(names, id.String())
	}
	return names, nil
}

// above is the part of a manifest's chain from name upwards.
func (m manifest) above(name string) []string {
	if i := slices.Index(m.chain, name); i >= 0 {
		return m.chain[i:]
	}
	return nil
}

// below is the part of a manifest's chain under name.
func (m manifest) below(name string) []string {
	return m.chain[:max(0, slices.Index(m.chain, name))]
}

// leadsTo tells whether the blob from, or one it refers to, is one of to, and
// which blobs lie on the way: an index, or an index of indexes.
func (l *library) leadsTo(from digest.Digest, to map[digest.Digest]bool) (way []digest.Digest, ok bool) {
	return l.follow(from, to, nil)
}

func (l *library) follow(from digest.Digest, to map[digest.Digest]bool, seen []digest.Digest) ([]digest.Digest, bool) {
	if to[from] {
		return []digest.Digest{from}, true
	}
	if slices.Contains(seen, from) {
		return nil, false
	}
	for label, child := range l.blobs[from].Labels {
		if !strings.HasPrefix(label, refContent) {
			continue
		}
		if way, ok := l.follow(digest.Digest(child), to, append(seen, from)); ok {
			return append(way, from), true
		}
	}
	return nil, false
}

// target is what an image's name points to.
func target(i *imagesapi.Image) digest.Digest { return digest.Digest(i.GetTarget().GetDigest()) }

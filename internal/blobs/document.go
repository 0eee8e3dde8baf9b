package blobs

import (
	"bytes"
	_ "crypto/sha256" // digests of these kinds can be checked
	_ "crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// largest is the size up to which a blob is read: containerd accepts
	// manifests up to half of that (MaxManifestSize in core/remotes/docker).
	largest = 8 << 20
	// sniffed is how much is read to see that a blob is not JSON.
	sniffed = 64
)

// document reads a blob that is a JSON object. It returns nil for any other,
// after its first bytes, and ErrCorrupt for one that does not have the digest d.
func document(path string, d digest.Digest) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	head := make([]byte, sniffed)
	n, err := io.ReadFull(f, head)
	if err != nil && err != io.ErrUnexpectedEOF && err != io.EOF {
		return nil, err
	}
	if head = head[:n]; !bytes.HasPrefix(bytes.TrimLeft(head, " \t\r\n"), []byte("{")) {
		return nil, nil
	}
	text, err := io.ReadAll(io.LimitReader(io.MultiReader(bytes.NewReader(head), f), largest+1))
	if err != nil {
		return nil, err
	}
	if len(text) > largest {
		return nil, corrupt("has more than %d bytes", largest)
	}
	if is := d.Algorithm().FromBytes(text); is != d {
		return nil, corrupt("has the content of %s", is)
	}
	return text, nil
}

// manifest is what a manifest contains of layers.
type manifest struct {
	config  digest.Digest
	layers  []ocispec.Descriptor
	diffIDs []digest.Digest // one for each layer; nil while the config was not read
	chains  []digest.Digest // likewise
}

// parseManifest returns nil when text is not the manifest of an image. Manifests
// need not have a media type; then their fields decide, as in containerd.
func parseManifest(text []byte) *manifest {
	var doc struct {
		MediaType string
		Config    ocispec.Descriptor
		Layers    []ocispec.Descriptor
		Manifests json.RawMessage // of an index
		FSLayers  json.RawMessage // of Docker's schema 1
	}
	if json.Unmarshal(text, &doc) != nil || len(doc.Manifests) > 0 || len(doc.FSLayers) > 0 {
		return nil
	}
	if doc.MediaType != "" && !images.IsManifestType(doc.MediaType) {
		return nil
	}
	if doc.Config.Digest.Validate() != nil {
		return nil
	}
	m := &manifest{config: doc.Config.Digest}
	for _, l := range doc.Layers {
		// containerd's unpacker leaves out what is not a layer before it counts.
		if !images.IsLayerType(l.MediaType) {
			continue
		}
		if l.Digest.Validate() != nil || l.Size < 0 {
			return nil
		}
		m.layers = append(m.layers, ocispec.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size})
	}
	if len(m.layers) == 0 {
		return nil
	}
	return m
}

// Manifest returns what the manifest of an image has of its configuration and its layers; ok
// is false when text is none.
func Manifest(text []byte) (config digest.Digest, layers []ocispec.Descriptor, ok bool) {
	m := parseManifest(text)
	if m == nil {
		return "", nil, false
	}
	return m.config, m.layers, true
}

// resolve reads the configuration, which knows the diff IDs.
func (m *manifest) resolve(dir string) error {
	path := filepath.Join(dir, m.config.Algorithm().String(), m.config.Encoded())
	info, err := os.Stat(path)
	switch {
	case os.IsNotExist(err):
		return fmt.Errorf("its config %s is missing", m.config)
	case err != nil:
		return cannot(err, "its config")
	case !info.Mode().IsRegular() || info.Size() > largest:
		return fmt.Errorf("its config %s is not a file of at most %d bytes", m.config, largest)
	}
	text, err := document(path, m.config)
	switch {
	case errors.Is(err, ErrCorrupt):
		return fmt.Errorf("its config %s %w", m.config, err)
	case os.IsNotExist(err):
		return fmt.Errorf("its config %s is missing", m.config)
	case err != nil:
		return cannot(err, "its config")
	}
	ids, ok, err := Config(text)
	if err != nil {
		return fmt.Errorf("its config %s %w", m.config, err)
	}
	if !ok {
		// A manifest can describe anything; containerd does not unpack this one.
		m.layers, m.diffIDs = nil, []digest.Digest{}
		return nil
	}
	if len(ids) != len(m.layers) {
		return fmt.Errorf("it has %d layers, its config %s has %d diff IDs", len(m.layers), m.config, len(ids))
	}
	m.diffIDs, m.chains = ids, identity.ChainIDs(slices.Clone(ids))
	return nil
}

// Config returns the diff IDs of an image's configuration; ok is false when text is
// none. The error is that of one which containerd would not unpack.
func Config(text []byte) (ids []digest.Digest, ok bool, err error) {
	var image struct{ RootFS ocispec.RootFS }
	if text == nil || json.Unmarshal(text, &image) != nil || len(image.RootFS.DiffIDs) == 0 {
		return nil, false, nil
	}
	if t := image.RootFS.Type; t != "" && t != "layers" {
		return nil, true, fmt.Errorf("has a rootfs of type %q", t)
	}
	for _, id := range image.RootFS.DiffIDs {
		if err := id.Validate(); err != nil {
			return nil, true, fmt.Errorf("has the diff ID %q: %w", id, err)
		}
	}
	return image.RootFS.DiffIDs, true, nil
}

package workload

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// WriteContent makes a content store of containerd's in dir with the images of
// the chains, but without the blobs of the layers that are named in missing.
// Every other blob is compressed.
//
// The store is made in scratch and copied: its probe for fs-verity leaves a file
// open (internal/fsverity, Enable), and what is open on a disk keeps it mounted.
func WriteContent(ctx context.Context, dir, scratch string, chains []Chain, missing ...string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("content store: %w", err)
		}
	}()
	made, err := os.MkdirTemp(scratch, "content")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(made)) }()
	store, err := local.NewStore(made)
	if err != nil {
		return err
	}
	for _, c := range chains {
		if err := c.writeContent(ctx, store, missing); err != nil {
			return err
		}
	}
	return os.CopyFS(dir, os.DirFS(made))
}

func (c *Chain) writeContent(ctx context.Context, store content.Store, missing []string) error {
	put := func(mediaType string, p []byte) (ocispec.Descriptor, error) {
		desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(p), Size: int64(len(p))}
		return desc, content.WriteBlob(ctx, store, desc.Digest.String(), bytes.NewReader(p), desc)
	}
	putJSON := func(mediaType string, v any) (ocispec.Descriptor, error) {
		p, err := json.Marshal(v)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		return put(mediaType, p)
	}
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	config := ocispec.Image{RootFS: ocispec.RootFS{Type: "layers"}}
	for i, l := range c.Layers {
		blob, mediaType := l.Tar, ocispec.MediaTypeImageLayer
		if i%2 == 0 {
			var err error
			if blob, err = gzipped(l.Tar); err != nil {
				return err
			}
			mediaType = ocispec.MediaTypeImageLayerGzip
		}
		desc, err := put(mediaType, blob)
		if err != nil {
			return err
		}
		if slices.Contains(missing, l.Name) {
			if err := store.Delete(ctx, desc.Digest); err != nil {
				return err
			}
		}
		manifest.Layers = append(manifest.Layers, desc)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.DiffID)
	}
	var err error
	if manifest.Config, err = putJSON(ocispec.MediaTypeImageConfig, config); err != nil {
		return err
	}
	_, err = putJSON(ocispec.MediaTypeImageManifest, manifest)
	return err
}

func gzipped(p []byte) ([]byte, error) {
	var out bytes.Buffer
	w, err := compression.CompressStream(&out, compression.Gzip)
	if err != nil {
		return nil, err
	}
	_, err = w.Write(p)
	err = errors.Join(err, w.Close())
	return out.Bytes(), err
}

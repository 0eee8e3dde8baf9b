package kit

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// imageName is the annotation by which containerd names an image that it imports.
const imageName = "io.containerd.image.name"

// WriteArchive writes an image archive, an OCI layout in a tar, of images of the registry. It
// gets its name when it is complete, as what reads archives may be at work.
func (r *Registry) WriteArchive(file string, all ...Pushed) (err error) {
	f, err := os.Create(file + ".part")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err == nil {
			err = os.Rename(f.Name(), file)
		}
		if err != nil {
			err = fmt.Errorf("archive %s: %w", file, errors.Join(err, os.Remove(f.Name())))
		}
	}()
	w := tar.NewWriter(f)
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	written := map[digest.Digest]bool{}
	for _, img := range all {
		manifest, err := os.ReadFile(r.Blob(img.Manifest))
		if err != nil {
			return err
		}
		var m ocispec.Manifest
		if err := json.Unmarshal(manifest, &m); err != nil {
			return err
		}
		_, tag, _ := strings.Cut(img.Ref[strings.LastIndex(img.Ref, "/"):], ":")
		index.Manifests = append(index.Manifests, ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageManifest, Digest: img.Manifest, Size: int64(len(manifest)),
			Annotations: map[string]string{imageName: img.Ref, ocispec.AnnotationRefName: tag},
		})
		for _, d := range append([]ocispec.Descriptor{{Digest: img.Manifest}, m.Config}, m.Layers...) {
			if written[d.Digest] {
				continue
			}
			written[d.Digest] = true
			body, err := os.ReadFile(r.Blob(d.Digest))
			if err == nil {
				err = archived(w, "blobs/"+d.Digest.Algorithm().String()+"/"+d.Digest.Encoded(), body)
			}
			if err != nil {
				return err
			}
		}
	}
	for name, doc := range map[string]any{ocispec.ImageIndexFile: index, ocispec.ImageLayoutFile: ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}} {
		body, err := json.Marshal(doc)
		if err == nil {
			err = archived(w, name, body)
		}
		if err != nil {
			return err
		}
	}
	return w.Close()
}

func archived(w *tar.Writer, name string, body []byte) error {
	err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(body)), Typeflag: tar.TypeReg})
	if err == nil {
		_, err = w.Write(body)
	}
	return err
}

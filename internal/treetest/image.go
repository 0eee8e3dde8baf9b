package treetest

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is an image in a content store.
type Image struct {
	Content  string          // directory of the store
	ChainIDs []string        // the base first
	Tars     [][]byte        // likewise
	Blobs    []digest.Digest // likewise
}

// NewImage makes an image of these layers in a new content store.
func NewImage(t testing.TB, tars [][]byte) *Image {
	t.Helper()
	m := &Image{Content: t.TempDir(), Tars: tars}
	var diffIDs []digest.Digest
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for i, layer := range tars {
		diffIDs = append(diffIDs, digest.FromBytes(layer))
		m.ChainIDs = append(m.ChainIDs, identity.ChainID(diffIDs).String())
		manifest.Layers = append(manifest.Layers, m.Put(t, ocispec.MediaTypeImageLayer, layer))
		m.Blobs = append(m.Blobs, manifest.Layers[i].Digest)
	}
	manifest.Config = m.PutJSON(t, ocispec.MediaTypeImageConfig, ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: diffIDs}})
	m.PutJSON(t, ocispec.MediaTypeImageManifest, manifest)
	return m
}

// Name is that of a committed layer, as containerd's namespace k8s.io has it.
func (m *Image) Name(i int) string { return fmt.Sprintf("k8s.io/%d/%s", 2*i+1, m.ChainIDs[i]) }

// Blob is the path of a blob.
func (m *Image) Blob(d digest.Digest) string {
	return filepath.Join(m.Content, "blobs", d.Algorithm().String(), d.Encoded())
}

// Put stores a blob.
func (m *Image) Put(t testing.TB, mediaType string, p []byte) ocispec.Descriptor {
	t.Helper()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(p), Size: int64(len(p))}
	Check(t, errors.Join(os.MkdirAll(filepath.Dir(m.Blob(d.Digest)), 0o755), os.WriteFile(m.Blob(d.Digest), p, 0o444)))
	return d
}

// PutJSON stores a document.
func (m *Image) PutJSON(t testing.TB, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	p, err := json.Marshal(v)
	Check(t, err)
	return m.Put(t, mediaType, p)
}

// Extract prepares layer i under key, on parent, and fills it as containerd does.
func (m *Image) Extract(t testing.TB, s snapshots.Snapshotter, i int, key, parent string, opts ...snapshots.Opt) {
	t.Helper()
	mounts, err := s.Prepare(t.Context(), key, parent, opts...)
	Check(t, err)
	var how []archive.ApplyOpt
	if parent != "" {
		how = append(how, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
	}
	_, err = archive.Apply(t.Context(), UpperDir(mounts), bytes.NewReader(m.Tars[i]), how...)
	Check(t, err)
}

// Pull extracts and commits all layers.
func (m *Image) Pull(t testing.TB, s snapshots.Snapshotter) {
	t.Helper()
	parent := ""
	for i, chainID := range m.ChainIDs {
		key := fmt.Sprintf("k8s.io/%d/extract-%d-x %s", 2*i, i, chainID)
		m.Extract(t, s, i, key, parent)
		Check(t, s.Commit(t.Context(), m.Name(i), key))
		parent = m.Name(i)
	}
}

// UpperDir is the directory that is written to through a snapshot's mounts.
func UpperDir(mounts []mount.Mount) string {
	for _, o := range mounts[0].Options {
		if upper, ok := strings.CutPrefix(o, "upperdir="); ok {
			return upper
		}
	}
	return mounts[0].Source
}

// LayerTar is layer i of an image: files of its own, one that every layer has, and
// from the second layer on a whiteout and an opaque directory.
func LayerTar(t testing.TB, i int) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, content string) {
		h.Size, h.ModTime = int64(len(content)), time.Unix(1_600_000_000, 0)
		Check(t, w.WriteHeader(&h))
		_, err := w.Write([]byte(content))
		Check(t, err)
	}
	add(tar.Header{Typeflag: tar.TypeDir, Name: "dir/", Mode: 0o750, Uid: 7}, "")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "dir/shared", Mode: 0o644}, fmt.Sprint("of layer ", i))
	add(tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint("dir/own", i), Mode: 0o4755}, strings.Repeat(fmt.Sprint("content ", i, "\n"), 1000))
	add(tar.Header{Typeflag: tar.TypeLink, Name: fmt.Sprint("hard", i), Linkname: fmt.Sprint("dir/own", i)}, "")
	add(tar.Header{Typeflag: tar.TypeSymlink, Name: "link", Linkname: "dir/shared"}, "")
	if i > 0 {
		add(tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint("dir/.wh.own", i-1)}, "")
		add(tar.Header{Typeflag: tar.TypeReg, Name: "opaque/.wh..wh..opq"}, "")
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint("opaque/f", i), Mode: 0o600}, "x")
	Check(t, w.Close())
	return b.Bytes()
}

// TarOf is a tar of empty entries.
func TarOf(t testing.TB, entries []tar.Header) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1_000_000_000, 0)
		}
		Check(t, w.WriteHeader(&h))
	}
	Check(t, w.Close())
	return &b
}

// TarDir is the entry of a directory.
func TarDir(name string, mode int64, uid int) tar.Header {
	return tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode, Uid: uid, Gid: uid}
}

// TarFile is the entry of a file.
func TarFile(name string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}
}

// TarOpaque is the entry that makes a directory opaque.
func TarOpaque(dir string) tar.Header { return TarFile(filepath.Join(dir, ".wh..wh..opq")) }

package layers

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

// pullAs is pull under other names and with labels.
func (m *machine) pullAs(s *daemon, name func(i int) string, labels func(i int) map[string]string) {
	m.Helper()
	parent := ""
	for i, chainID := range m.ChainIDs {
		key := fmt.Sprintf("ns/%d/extract-%d %s", 2*i, i, chainID)
		opts := []snapshots.Opt{snapshots.WithLabels(labels(i))}
		m.Extract(m.T, s, i, key, parent, opts...)
		if err := s.Commit(m.Context(), name(i), key, opts...); err != nil {
			m.Fatal(err)
		}
		parent = name(i)
	}
}

// hurt removes a file of a committed layer, and boots after a crash.
func (m *machine) hurt(s *daemon, name, file string) *daemon {
	m.Helper()
	s.layers.table.mu.Lock()
	tree := s.root.Tree(s.layers.table.layers[name].entry.ID)
	s.layers.table.mu.Unlock()
	if err := os.Remove(filepath.Join(tree, file)); err != nil {
		m.Fatal(err)
	}
	crash(m.T, s)
	return m.boot(false)
}

// TestHealUnderOtherNames: what a layer is called differs from client to client; it is
// healed from its blob when the name or the labels of the extraction say which it is.
func TestHealUnderOtherNames(t *testing.T) {
	none := func(int) map[string]string { return nil }
	for name, c := range map[string]struct {
		name   func(m *machine, i int) string
		labels func(m *machine) func(i int) map[string]string
		healed bool
	}{
		"BuildKit": {
			func(m *machine, i int) string {
				return fmt.Sprintf("buildkit/%d/buildkit-layer-snapshot-v1-sha256-%s", i, m.ChainIDs[i][7:])
			}, func(*machine) func(int) map[string]string { return none }, true,
		},
		"names that say nothing with diff IDs": {
			func(_ *machine, i int) string { return fmt.Sprintf("ns/%d/layer-%d", i, i) },
			func(m *machine) func(i int) map[string]string {
				return func(i int) map[string]string {
					return map[string]string{layout.LabelDiffID: digest.FromBytes(treetest.LayerTar(m.T, i)).String()}
				}
			}, true,
		},
		"names that say nothing": {
			func(_ *machine, i int) string { return fmt.Sprintf("ns/%d/layer-%d", i, i) },
			func(*machine) func(int) map[string]string { return none }, false,
		},
		"a label that is no proof": {
			func(_ *machine, i int) string { return fmt.Sprintf("ns/%d/layer-%d", i, i) },
			func(m *machine) func(i int) map[string]string {
				return func(i int) map[string]string { return map[string]string{layout.LabelTarget: m.ChainIDs[1-i]} }
			}, false,
		},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			m := newMachine(t, 2)
			s := m.boot(false)
			named := func(i int) string { return c.name(m, i) }
			m.pullAs(s, named, c.labels(m))
			s = m.hurt(s, named(1), "dir/own1")
			_, err := s.Stat(t.Context(), named(1))
			var damaged *DamagedError
			switch {
			case c.healed && err != nil:
				t.Errorf("not healed: %v", err)
			case !c.healed && (!errors.As(err, &damaged) || damaged.NoBlob):
				t.Errorf("error %v, of a layer that nothing is known of", err)
			}
		})
	}
}

// TestRemappedIsNotTheLayer: a layer with shifted owners has a digest as its name that
// is no chain ID. It is not healed from the blob of the layer that it was made of.
func TestRemappedIsNotTheLayer(t *testing.T) {
	m := newMachine(t, 2)
	s := m.boot(false)
	m.pull(s)
	id := digest.FromString(`{"Parent":"` + m.ChainIDs[1] + `","IDMap":{}}`).String()
	key, name := "k8s.io/90/"+id+"-remap", "k8s.io/91/"+id
	mounts, err := s.Prepare(t.Context(), key, m.name(1))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(treetest.UpperDir(mounts), "shifted"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), name, key); err != nil {
		t.Fatal(err)
	}
	s = m.hurt(s, name, "shifted")
	var damaged *DamagedError
	if _, err := s.Stat(t.Context(), name); !errors.As(err, &damaged) || !damaged.NoBlob {
		t.Errorf("error %v", err)
	}
	if _, err := s.Stat(t.Context(), m.name(1)); err != nil {
		t.Errorf("the layer below: %v", err)
	}
}

// TestNoBlobOnlyWhenBad: a daemon that cannot use a blob, or sees no content store,
// does not report that there is no good blob: images are dropped upon that.
func TestNoBlobOnlyWhenBad(t *testing.T) {
	again := func(m *machine, mediaType string, pack func([]byte) []byte) {
		// Another manifest of the same image, without the blobs of the first.
		var diffIDs []digest.Digest
		manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
		must(m.T, os.RemoveAll(filepath.Join(m.Content, "blobs")))
		for i := range m.ChainIDs {
			layer := treetest.LayerTar(m.T, i)
			diffIDs = append(diffIDs, digest.FromBytes(layer))
			manifest.Layers = append(manifest.Layers, m.Put(m.T, mediaType, pack(layer)))
		}
		manifest.Config = m.PutJSON(m.T, ocispec.MediaTypeImageConfig, ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: diffIDs}})
		m.PutJSON(m.T, ocispec.MediaTypeImageManifest, manifest)
	}
	zip := func(p []byte) []byte {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, err := w.Write(p)
		must(t, errors.Join(err, w.Close()))
		return b.Bytes()
	}
	for name, c := range map[string]struct {
		do     func(m *machine)
		healed bool
		noBlob bool
		text   string
	}{
		"missing": {func(m *machine) { must(m.T, os.Remove(m.Blob(m.Blobs[1]))) }, false, true, "is missing"},
		"corrupt": {func(m *machine) {
			must(m.T, os.WriteFile(m.Blob(m.Blobs[1]), bytes.Repeat([]byte{0}, len(treetest.LayerTar(m.T, 1))), 0o444))
		}, false, true, "has the content of"},
		"no store":    {func(m *machine) { must(m.T, os.Rename(m.Content, m.Content+".away")) }, false, false, "set content_root"},
		"empty store": {func(m *machine) { must(m.T, os.RemoveAll(filepath.Join(m.Content, "blobs/sha256"))) }, false, false, "set content_root"},
		"encrypted": {func(m *machine) {
			again(m, images.MediaTypeImageLayerGzipEncrypted, func(p []byte) []byte { return append([]byte("cipher"), p...) })
		}, false, false, "is encrypted"},
		"unknown media type": {func(m *machine) {
			again(m, "application/vnd.oci.image.layer.v9.tar+rar", zip)
		}, false, false, "is not a tar"},
		"decompressors that are killed": {func(m *machine) {
			dir := m.TempDir()
			for _, name := range []string{"igzip", "unpigz"} {
				must(m.T, os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\nkill -9 $$\n"), 0o755))
			}
			m.Setenv("PATH", dir+":"+os.Getenv("PATH"))
			again(m, ocispec.MediaTypeImageLayerGzip, zip)
		}, true, false, ""},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			m := newMachine(t, 2)
			s := m.boot(false)
			m.pull(s)
			s = m.hurt(s, m.name(1), "dir/own1")
			c.do(m)
			_, err := s.Stat(t.Context(), m.name(1))
			if c.healed {
				must(t, err)
				return
			}
			var damaged *DamagedError
			if !errors.As(err, &damaged) || damaged.NoBlob != c.noBlob || !strings.Contains(err.Error(), c.text) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// must ends the test with an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

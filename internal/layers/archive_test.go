package layers

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

	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// save writes the image as docker save does, with the layers that holds returns.
func (m *machine) save(holds func(i int) []byte) (dir string) {
	m.Helper()
	var list struct{ Layers []string }
	var image ocispec.Image
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	add := func(name string, body []byte) {
		must(m.T, w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(body))}))
		_, err := w.Write(body)
		must(m.T, err)
	}
	for i := range m.ChainIDs {
		image.RootFS.DiffIDs = append(image.RootFS.DiffIDs, digest.FromBytes(treetest.LayerTar(m.T, i)))
		list.Layers = append(list.Layers, fmt.Sprintf("%d/layer.tar", i))
		add(list.Layers[i], holds(i))
	}
	config, err := json.Marshal(image)
	must(m.T, err)
	add("config.json", config)
	text, err := json.Marshal([]any{map[string]any{"Config": "config.json", "Layers": list.Layers}})
	must(m.T, err)
	add("manifest.json", text)
	must(m.T, w.Close())
	dir = m.TempDir()
	must(m.T, os.WriteFile(filepath.Join(dir, "images.tar"), buf.Bytes(), 0o644))
	return dir
}

// TestHealFromArchive: where the content store has no good blob of a layer, it is healed from
// an image archive, and the caller learns which blob that was. Where an archive has no good one
// either, the layer has none.
func TestHealFromArchive(t *testing.T) {
	whole := func(m *machine) func(int) []byte { return func(i int) []byte { return treetest.LayerTar(m.T, i) } }
	for name, c := range map[string]struct {
		lose     func(m *machine)
		archives func(m *machine) []string
		outside  bool // the archive is used
		noBlob   bool // nothing is
	}{
		"blob good":    {func(*machine) {}, func(m *machine) []string { return []string{m.save(whole(m))} }, false, false},
		"blob missing": {func(m *machine) { must(m.T, os.Remove(m.Blob(m.Blobs[1]))) }, func(m *machine) []string { return []string{m.save(whole(m))} }, true, false},
		"blob corrupt": {func(m *machine) {
			must(m.T, os.WriteFile(m.Blob(m.Blobs[1]), make([]byte, len(treetest.LayerTar(m.T, 1))), 0o444))
		}, func(m *machine) []string { return []string{"/not/there", m.save(whole(m))} }, true, false},
		"another layer in the archive": {func(m *machine) { must(m.T, os.Remove(m.Blob(m.Blobs[1]))) }, func(m *machine) []string {
			return []string{m.save(func(i int) []byte { return treetest.LayerTar(m.T, 1-i) })}
		}, false, true},
		"no archive":       {func(m *machine) { must(m.T, os.Remove(m.Blob(m.Blobs[1]))) }, func(*machine) []string { return []string{"/not/there"} }, false, true},
		"no content store": {func(m *machine) { must(m.T, os.RemoveAll(m.Content)) }, func(m *machine) []string { return []string{m.save(whole(m))} }, true, false},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			m := newMachine(t, 2)
			var outside []blobs.Blob
			archives := c.archives(m)
			m.config = func(cfg *DaemonConfig) {
				cfg.Archives = archives
				cfg.OnOutside = func(e storage.CommitEntry, b blobs.Blob) {
					if e.Name != m.name(1) || e.Strategy != storage.StrategyHealed {
						t.Errorf("called with %+v", e)
					}
					outside = append(outside, b)
				}
			}
			s := m.boot(false)
			m.pull(s)
			c.lose(m)
			s = m.hurt(s, m.name(1), "dir/own1")
			_, err := s.Stat(t.Context(), m.name(1))
			var damaged *DamagedError
			switch {
			case !c.noBlob && err != nil:
				t.Fatalf("not healed: %v", err)
			case c.noBlob && (!errors.As(err, &damaged) || !damaged.NoBlob):
				t.Fatalf("error %v", err)
			case !c.noBlob:
				m.wantWhole(s)
			}
			if c.outside != (len(outside) == 1) || c.outside && outside[0].DiffID != digest.FromBytes(treetest.LayerTar(t, 1)) {
				t.Errorf("used from outside: %v", outside)
			}
		})
	}
}

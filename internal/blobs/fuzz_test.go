package blobs

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FuzzStore: whatever a manifest, its configuration and its layer hold, a search for the
// layer ends with the layer, or with an error of a known kind. The words MANIFEST,
// CONFIG, LAYER and TAR in a document stand for the digests of the blobs, because a fuzzer
// does not find those.
func FuzzStore(f *testing.F) {
	layer := archive(f, 1, 600)
	manifest := `{"mediaType":"` + ocispec.MediaTypeImageManifest + `","config":{"digest":"CONFIG","size":100},"layers":[{"mediaType":"` +
		ocispec.MediaTypeImageLayerGzip + `","digest":"LAYER","size":SIZE}]}`
	config := `{"rootfs":{"type":"layers","diff_ids":["TAR"]}}`
	for _, how := range []compression.Compression{compression.Gzip, compression.Zstd, compression.Uncompressed} {
		f.Add([]byte(manifest), []byte(config), pack(f, layer, how))
	}
	f.Add([]byte(strings.Replace(manifest, "CONFIG", "MANIFEST", 1)), []byte(`{"rootfs":{"diff_ids":["x"]}}`), []byte("\x1f\x8b\x08"))
	want := digest.FromBytes(layer)
	f.Fuzz(func(t *testing.T, manifest, config, blob []byte) {
		dir := t.TempDir()
		check(t, os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755))
		words := map[string]string{"TAR": want.String(), "LAYER": digest.FromBytes(blob).String(), "SIZE": strconv.Itoa(len(blob))}
		put := func(word string, text []byte) {
			if word != "LAYER" {
				for from, to := range words {
					text = bytes.ReplaceAll(text, []byte(from), []byte(to))
				}
			}
			d := digest.FromBytes(text)
			words[word] = d.String()
			check(t, os.WriteFile(filepath.Join(dir, "blobs", "sha256", d.Encoded()), text, 0o644))
		}
		put("LAYER", blob)
		put("CONFIG", config)
		put("MANIFEST", manifest)
		s := Open(dir)
		for _, layer := range []Layer{{ChainID: want.String(), Entries: 2, Bytes: 600}, {ChainID: want.String(), DiffID: want.String()}} {
			found, err := s.Find(t.Context(), layer)
			if err != nil && !Unusable(err) || err == nil && len(found) == 0 {
				t.Errorf("found %v, error %v", found, err)
			}
			for _, b := range found {
				if _, err := extract(t, s, b); err != nil && !Unusable(err) {
					t.Errorf("extract: %v", err)
				}
			}
			used := false
			err = s.Try(t.Context(), layer, func(b Blob) error {
				_, err := extract(t, s, b)
				used = used || err == nil
				return err
			})
			if err != nil && !Unusable(err) || (err == nil) != used {
				t.Errorf("used %v, error %v", used, err)
			}
		}
	})
}

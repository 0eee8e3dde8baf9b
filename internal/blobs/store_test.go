package blobs

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestMain(m *testing.M) {
	// containerd's store warns of each file system without fs-verity.
	if err := log.SetLevel("error"); err != nil {
		panic(err)
	}
	os.Exit(withKilledDecompressors(m))
}

// withKilledDecompressors runs the tests with an igzip and an unpigz in PATH that
// are killed whenever they are started, as for want of memory. containerd looks
// for them once in a process.
func withKilledDecompressors(m *testing.M) int {
	dir, err := os.MkdirTemp("", "killed")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	for _, name := range []string{"igzip", "unpigz"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\nkill -9 $$\n"), 0o755); err != nil {
			panic(err)
		}
	}
	if err := os.Setenv("PATH", dir+":"+os.Getenv("PATH")); err != nil {
		panic(err)
	}
	return m.Run()
}

// root is a content store that containerd's own code writes.
type root struct {
	testing.TB
	dir string
	content.Store
}

func newRoot(t testing.TB) *root {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "io.containerd.content.v1.content")
	cs, err := local.NewStore(dir)
	check(t, err)
	return &root{t, dir, cs}
}

func (r *root) path(d digest.Digest) string {
	return filepath.Join(r.dir, "blobs", d.Algorithm().String(), d.Encoded())
}

// put stores a blob.
func (r *root) put(mediaType string, p []byte) ocispec.Descriptor {
	r.Helper()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(p), Size: int64(len(p))}
	err := content.WriteBlob(context.Background(), r, d.Digest.String(), bytes.NewReader(p), d)
	if !errdefs.IsAlreadyExists(err) {
		check(r, err)
	}
	return d
}

func (r *root) json(mediaType string, v any) ocispec.Descriptor {
	r.Helper()
	p, err := json.Marshal(v)
	check(r, err)
	return r.put(mediaType, p)
}

// write replaces a blob behind containerd's back, as a power cut does.
func (r *root) write(d digest.Digest, p []byte) {
	r.Helper()
	check(r, os.Remove(r.path(d)))
	check(r, os.WriteFile(r.path(d), p, 0o444))
}

func (r *root) read(d digest.Digest) []byte {
	r.Helper()
	p, err := os.ReadFile(r.path(d))
	check(r, err)
	return p
}

// archive is a tar with one file whose content follows from the seed and does
// not compress.
func archive(t testing.TB, seed uint64, size int) []byte {
	t.Helper()
	body := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(body)
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	check(t, w.WriteHeader(&tar.Header{Name: fmt.Sprint("file", seed), Mode: 0o644, Size: int64(size)}))
	_, err := w.Write(body)
	check(t, err)
	check(t, w.Close())
	return buf.Bytes()
}

func pack(t testing.TB, p []byte, how compression.Compression) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := compression.CompressStream(&buf, how)
	check(t, err)
	_, err = w.Write(p)
	check(t, err)
	check(t, w.Close())
	return buf.Bytes()
}

// image is what a test knows of an image that it stored.
type image struct {
	manifest, config ocispec.Descriptor
	layers           []ocispec.Descriptor
	tars             [][]byte
	diffIDs, chains  []digest.Digest
}

func (r *root) finish(img image, docker bool) image {
	r.Helper()
	configType, manifestType := ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageManifest
	if docker {
		configType, manifestType = images.MediaTypeDockerSchema2Config, images.MediaTypeDockerSchema2Manifest
	}
	img.config = r.json(configType, ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: img.diffIDs}})
	m := ocispec.Manifest{MediaType: manifestType, Config: img.config, Layers: img.layers}
	m.SchemaVersion = 2
	img.manifest = r.json(manifestType, m)
	img.chains = identity.ChainIDs(slices.Clone(img.diffIDs))
	return img
}

var plain = map[compression.Compression]string{
	compression.Gzip:         ocispec.MediaTypeImageLayerGzip,
	compression.Zstd:         ocispec.MediaTypeImageLayerZstd,
	compression.Uncompressed: ocispec.MediaTypeImageLayer,
}

// image stores an image of three layers of 20 KiB.
func (r *root) image(how compression.Compression) image {
	r.Helper()
	var img image
	for i := range 3 {
		t := archive(r, uint64(i), 20_000)
		img.tars = append(img.tars, t)
		img.diffIDs = append(img.diffIDs, digest.FromBytes(t))
		img.layers = append(img.layers, r.put(plain[how], pack(r, t, how)))
	}
	return r.finish(img, false)
}

// wants compares what Find returns for a chain with digests of blobs.
func (r *root) wants(s *Store, chain digest.Digest, want ...digest.Digest) []Blob {
	r.Helper()
	found, err := s.Find(r.Context(), Layer{ChainID: chain.String()})
	check(r, err)
	var have []digest.Digest
	for _, b := range found {
		have = append(have, b.Digest)
	}
	slices.Sort(have)
	if slices.Sort(want); !slices.Equal(have, want) {
		r.Fatalf("chain %s has the blobs %v, want %v", chain, have, want)
	}
	return found
}

// refuses demands an error of Find of the kind ErrNotFound that contains the reasons.
func (r *root) refuses(s *Store, chain digest.Digest, why ...string) {
	r.Helper()
	r.refusesAs(ErrNotFound, s, chain, why...)
}

func (r *root) refusesAs(kind error, s *Store, chain digest.Digest, why ...string) {
	r.Helper()
	found, err := s.Find(r.Context(), Layer{ChainID: chain.String()})
	if kindOf(err) != kind || len(found) > 0 {
		r.Fatalf("found %v, error %v, want the kind %v", found, err, kind)
	}
	if Bad(err) != (kind == ErrNotFound || kind == ErrCorrupt) {
		r.Errorf("%v: bad is %v", err, Bad(err))
	}
	for _, w := range why {
		if !strings.Contains(err.Error(), w) {
			r.Errorf("error %q does not contain %q", err, w)
		}
	}
}

func TestFindEveryLayer(t *testing.T) {
	for how, mediaType := range plain {
		t.Run(mediaType, func(t *testing.T) {
			r := newRoot(t)
			img := r.image(how)
			s := Open(r.dir)
			for i, chain := range img.chains {
				b := r.wants(s, chain, img.layers[i].Digest)[0]
				if b.DiffID != img.diffIDs[i] || b.Size != img.layers[i].Size || b.MediaType != mediaType {
					t.Errorf("layer %d is %+v", i, b)
				}
			}
		})
	}
}

func TestFindDockerImage(t *testing.T) {
	for mediaType, how := range map[string]compression.Compression{
		images.MediaTypeDockerSchema2LayerGzip:        compression.Gzip,
		images.MediaTypeDockerSchema2LayerZstd:        compression.Zstd,
		images.MediaTypeDockerSchema2Layer:            compression.Gzip, // some registries omit that
		images.MediaTypeDockerSchema2LayerForeignGzip: compression.Gzip,
	} {
		r := newRoot(t)
		a := archive(t, 1, 1000)
		img := r.finish(image{
			diffIDs: []digest.Digest{digest.FromBytes(a)},
			layers:  []ocispec.Descriptor{r.put(mediaType, pack(t, a, how))},
		}, true)
		r.wants(Open(r.dir), img.chains[0], img.layers[0].Digest)
	}
}

// TestFindByShape: OCI allows manifests without a media type.
func TestFindByShape(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	check(t, os.Remove(r.path(img.manifest.Digest)))
	r.json("", map[string]any{"schemaVersion": 2, "config": img.config, "layers": img.layers})
	r.wants(Open(r.dir), img.chains[2], img.layers[2].Digest)
}

// TestFindAmongOtherBlobs: what is no manifest of an image changes nothing, and
// is not complained about.
func TestFindAmongOtherBlobs(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	r.json(ocispec.MediaTypeImageIndex, ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{img.manifest}})
	r.json("", map[string]any{"fsLayers": []string{"schema 1"}, "config": img.config, "layers": img.layers[:1]})
	r.json("", map[string]any{"config": img.config, "layers": []any{map[string]any{"mediaType": ocispec.MediaTypeImageLayer, "digest": "sha256:../../etc/passwd"}}})
	r.json("", map[string]any{"config": map[string]any{"digest": "no digest"}, "layers": img.layers})
	// An artifact whose blobs are called layers, and a signature.
	r.json(ocispec.MediaTypeImageManifest, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: r.put(ocispec.MediaTypeEmptyJSON, []byte("{}")), Layers: img.layers})
	r.json(ocispec.MediaTypeImageManifest, ocispec.Manifest{Config: img.config, Layers: []ocispec.Descriptor{r.put("application/vnd.dev.cosign.simplesigning.v1+json", []byte(`{"critical":{}}`))}})
	r.put("", []byte("{ is where JSON ends"))
	r.put("", []byte("{"))
	r.put("", []byte("x"))
	r.put("", bytes.Repeat([]byte(" {"), sniffed))
	for _, name := range []string{"sha256/short", "sha256/" + strings.Repeat("Z", 64), "sha999/" + strings.Repeat("0", 64)} {
		check(t, os.MkdirAll(filepath.Dir(filepath.Join(r.dir, "blobs", name)), 0o755))
		check(t, os.WriteFile(filepath.Join(r.dir, "blobs", name), []byte("{}"), 0o644))
	}
	check(t, os.Mkdir(r.path(digest.FromString("directory")), 0o755))
	s := Open(r.dir)
	for i, chain := range img.chains {
		r.wants(s, chain, img.layers[i].Digest)
	}
	_, err := s.Find(t.Context(), Layer{ChainID: digest.FromString("unknown").String()})
	if err == nil || strings.Contains(err.Error(), "skipped") {
		t.Errorf("error %v", err)
	}
}

// TestFindCountsWhatIsUnpacked: containerd leaves out what is not a layer.
func TestFindCountsWhatIsUnpacked(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	check(t, os.Remove(r.path(img.manifest.Digest)))
	other := r.put("application/vnd.example.sbom+json", []byte("no layer"))
	img.layers = slices.Insert(img.layers, 1, other)
	img = r.finish(img, false)
	r.wants(Open(r.dir), img.chains[2], img.layers[3].Digest)
}

func TestFindSeveralBlobs(t *testing.T) {
	r := newRoot(t)
	gz, zst := r.image(compression.Gzip), r.image(compression.Zstd)
	r.finish(gz, true) // a third manifest, with the blobs of the first
	s := Open(r.dir)
	r.wants(s, gz.chains[1], gz.layers[1].Digest, zst.layers[1].Digest)
	check(t, os.Remove(r.path(gz.layers[1].Digest)))
	r.wants(s, gz.chains[1], zst.layers[1].Digest)
	check(t, os.Truncate(r.path(zst.layers[1].Digest), 7))
	r.refusesAs(ErrCorrupt, s, gz.chains[1], gz.layers[1].Digest.String()+" is missing",
		fmt.Sprintf("%s has 7 bytes, %d expected", zst.layers[1].Digest, zst.layers[1].Size))
}

func TestFindSaysWhy(t *testing.T) {
	kinds := map[string]error{ // ErrNotFound for the others
		"blob shorter": ErrCorrupt, "blob longer": ErrCorrupt, "blob a directory": ErrCorrupt,
		"encrypted": ErrCannot, "erofs": ErrCannot,
		"all blobs gone": ErrNoStore, "store gone": ErrNoStore,
	}
	for name, c := range map[string]struct {
		damage func(r *root, img *image)
		why    []string
	}{
		"blob missing": {func(r *root, img *image) { check(r, os.Remove(r.path(img.layers[2].Digest))) },
			[]string{"its blob sha256:", "is missing"}},
		"blob shorter": {func(r *root, img *image) { check(r, os.Truncate(r.path(img.layers[2].Digest), 100)) },
			[]string{"has 100 bytes, 20", "expected"}},
		"blob longer": {func(r *root, img *image) {
			r.write(img.layers[2].Digest, append(r.read(img.layers[2].Digest), 0))
		}, []string{"expected"}},
		"blob a directory": {func(r *root, img *image) {
			check(r, os.Remove(r.path(img.layers[2].Digest)))
			check(r, os.Mkdir(r.path(img.layers[2].Digest), 0o755))
		}, []string{"is not a file"}},
		"manifest missing": {func(r *root, img *image) { check(r, os.Remove(r.path(img.manifest.Digest))) },
			[]string{"no manifest in ", " names chain ID sha256:"}},
		"manifest empty": {func(r *root, img *image) { r.write(img.manifest.Digest, nil) },
			[]string{"no manifest in "}},
		"manifest of zeros": {func(r *root, img *image) {
			r.write(img.manifest.Digest, make([]byte, img.manifest.Size))
		}, []string{"no manifest in "}},
		"manifest with a flipped bit": {func(r *root, img *image) {
			p := r.read(img.manifest.Digest)
			p[bytes.Index(p, []byte("sha256:"))+10] ^= 1
			r.write(img.manifest.Digest, p)
		}, []string{"skipped: sha256:", "has the content of sha256:"}},
		"config missing": {func(r *root, img *image) { check(r, os.Remove(r.path(img.config.Digest))) },
			[]string{"skipped: manifest sha256:", "its config sha256:", "is missing"}},
		"config with a flipped bit": {func(r *root, img *image) {
			p := r.read(img.config.Digest)
			p[bytes.LastIndex(p, []byte("sha256:"))+10] ^= 1
			r.write(img.config.Digest, p)
		}, []string{"its config sha256:", "has the content of sha256:"}},
		"config of another image": {func(r *root, img *image) {
			check(r, os.Remove(r.path(img.manifest.Digest)))
			img.layers = img.layers[:2]
			r.finish(*img, false)
		}, []string{"no manifest in ", "it has 2 layers, its config sha256:", "has 3 diff IDs"}},
		"config huge": {func(r *root, img *image) { check(r, os.Truncate(r.path(img.config.Digest), largest+1)) },
			[]string{"is not a file of at most 8388608 bytes"}},
		"encrypted": {func(r *root, img *image) {
			check(r, os.Remove(r.path(img.manifest.Digest)))
			img.layers[2].MediaType = images.MediaTypeImageLayerGzipEncrypted
			r.finish(*img, false)
		}, []string{"is encrypted (application/vnd.oci.image.layer.v1.tar+gzip+encrypted)"}},
		"foreign": {func(r *root, img *image) {
			check(r, os.Remove(r.path(img.manifest.Digest)))
			check(r, os.Remove(r.path(img.layers[2].Digest)))
			img.layers[2].MediaType = images.MediaTypeDockerSchema2LayerForeignGzip
			r.finish(*img, true)
		}, []string{"is missing: it is a foreign layer"}},
		"erofs": {func(r *root, img *image) {
			check(r, os.Remove(r.path(img.manifest.Digest)))
			img.layers[2].MediaType = images.MediaTypeErofsLayer
			r.finish(*img, false)
		}, []string{"is not a tar (application/vnd.erofs.layer.v1)"}},
		"all blobs gone": {func(r *root, img *image) { check(r, os.RemoveAll(filepath.Join(r.dir, "blobs/sha256"))) },
			[]string{"there is no content store in /", "(blobs is empty)"}},
		"store gone": {func(r *root, img *image) { check(r, os.RemoveAll(r.dir)) },
			[]string{"there is no content store in /"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRoot(t)
			img := r.image(compression.Gzip)
			fresh, used := Open(r.dir), Open(r.dir)
			for i, chain := range img.chains {
				r.wants(used, chain, img.layers[i].Digest)
			}
			top := img.chains[2]
			c.damage(r, &img)
			kind := cmp.Or(kinds[name], ErrNotFound)
			r.refusesAs(kind, fresh, top, c.why...)
			if strings.HasPrefix(name, "config ") && name != "config of another image" {
				// Diff IDs that were read once do not change.
				r.wants(used, top, img.layers[2].Digest)
				return
			}
			r.refusesAs(kind, used, top, c.why...)
		})
	}
}

func TestFindWithoutStore(t *testing.T) {
	r := newRoot(t)
	x := digest.FromString("x")
	file := filepath.Join(r.dir, "file")
	check(t, os.WriteFile(file, nil, 0o600))
	for path, why := range map[string]string{
		"":                                 "no content store is configured",
		filepath.Join(r.dir, "elsewhere"):  "no content store in " + r.dir + "/elsewhere (it has no directory blobs)",
		r.dir:                              "it has no directory blobs", // containerd has written nothing yet
		filepath.Join(r.dir, "file"):       "it has no directory blobs",
		filepath.Join(r.dir, "file/below"): "it has no directory blobs",
	} {
		s := Open(path)
		r.refusesAs(ErrNoStore, s, x, why)
		_, err := s.ReaderAt(t.Context(), ocispec.Descriptor{Digest: x})
		if !errors.Is(err, ErrNoStore) || Bad(err) {
			t.Errorf("opening a blob in %q: %v", path, err)
		}
	}
	r.image(compression.Gzip)
	for _, chain := range []digest.Digest{"k8s.io/1/key", ""} {
		r.refusesAs(ErrCannot, Open(r.dir), chain, "no blob can be determined by the chain ID")
	}
	for _, d := range []digest.Digest{"", "sha256:..", "sha256:../../../../etc/passwd"} {
		if _, err := Open(r.dir).ReaderAt(t.Context(), ocispec.Descriptor{Digest: d}); !errors.Is(err, ErrNotFound) {
			t.Errorf("opening %q: %v", d, err)
		}
	}
}

// TestErrorsAreNotErrdefs: containerd must not take a missing blob for a missing
// snapshot.
func TestErrorsAreNotErrdefs(t *testing.T) {
	r := newRoot(t)
	_, err := Open(r.dir).Find(t.Context(), Layer{ChainID: digest.FromString("x").String()})
	_, err2 := Open(r.dir).ReaderAt(t.Context(), ocispec.Descriptor{Digest: digest.FromString("x")})
	if err == nil || err2 == nil || errdefs.IsNotFound(err) || errdefs.IsNotFound(err2) {
		t.Error(err, err2)
	}
}

func TestFindFromManyGoroutines(t *testing.T) {
	r := newRoot(t)
	first := r.image(compression.Gzip)
	s := Open(r.dir)
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for i := range 50 {
				chain := first.chains[(g+i)%3]
				if found, err := s.Find(t.Context(), Layer{ChainID: chain.String()}); err != nil || found[0].DiffID != first.diffIDs[(g+i)%3] {
					t.Error(found, err)
				}
				if _, err := s.Find(t.Context(), Layer{ChainID: digest.FromString(fmt.Sprint(g, i)).String()}); !errors.Is(err, ErrNotFound) {
					t.Error(err)
				}
			}
		})
	}
	for i := range 20 {
		a := archive(t, uint64(100+i), 100)
		img := r.finish(image{diffIDs: []digest.Digest{digest.FromBytes(a)}, layers: []ocispec.Descriptor{r.put(ocispec.MediaTypeImageLayer, a)}}, false)
		r.wants(s, img.chains[0], img.layers[0].Digest)
	}
	wg.Wait()
}

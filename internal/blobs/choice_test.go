package blobs

import (
	"bytes"
	"errors"
	"io"
	"os"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// claim stores a manifest that names another blob for a layer of an image.
func (r *root) claim(img image, layer int, blob ocispec.Descriptor) {
	r.Helper()
	layers := append([]ocispec.Descriptor{}, img.layers...)
	layers[layer] = blob
	r.finish(image{layers: layers, diffIDs: img.diffIDs}, false)
}

// sizes are the entries and bytes of the layers of root.image.
func sizes(chain digest.Digest) Layer {
	return Layer{ChainID: chain.String(), Entries: 2, Bytes: 20_000}
}

// extract is what healing does with a blob: it reads the tar to its end and
// compares its digest.
func extract(t testing.TB, s *Store, b Blob) (read int64, err error) {
	l, err := b.Layer(t.Context())
	if err != nil {
		return 0, err
	}
	defer l.Close()
	digester := digest.Canonical.Digester()
	read, err = io.Copy(digester.Hash(), l)
	if err == nil && digester.Digest() != b.DiffID {
		err = b.Mismatch(t.Context(), digester.Digest())
	}
	return read, err
}

// TestTry: of what kind the error is when no blob of a layer can be used, and
// which blobs are tried at all.
func TestTry(t *testing.T) {
	bomb := bytes.Repeat([]byte{0}, 80<<20) // over the bound, 80 KiB when compressed
	encrypted := func(r *root) ocispec.Descriptor {
		return r.put(images.MediaTypeImageLayerGzipEncrypted, []byte("cipher text"))
	}
	remove := func(r *root, img image) { check(r, os.Remove(r.path(img.layers[1].Digest))) }
	spoil := func(r *root, img image) {
		p := r.read(img.layers[1].Digest)
		p[len(p)/2] ^= 0xff
		r.write(img.layers[1].Digest, p)
	}
	// Of the manifests in the store, the first is that of the image.
	for name, c := range map[string]struct {
		make func(r *root, img image)
		kind error // nil: the image's own blob is used
	}{
		"good":    {func(*root, image) {}, nil},
		"missing": {remove, ErrNotFound},
		"corrupt": {spoil, ErrCorrupt},
		"another layer's blob": {func(r *root, img image) {
			r.claim(img, 1, img.layers[0])
		}, nil},
		"another layer's blob, own missing": {func(r *root, img image) {
			r.claim(img, 1, img.layers[0])
			remove(r, img)
		}, ErrNotFound},
		"another layer's blob, own corrupt": {func(r *root, img image) {
			r.claim(img, 1, img.layers[0])
			spoil(r, img)
		}, ErrCorrupt},
		"garbage": {func(r *root, img image) {
			r.claim(img, 1, r.put(ocispec.MediaTypeImageLayerGzip, []byte("\x1f\x8b\x08garbage that is no gzip")))
		}, nil},
		"garbage, own missing": {func(r *root, img image) {
			r.claim(img, 1, r.put(ocispec.MediaTypeImageLayerGzip, []byte("\x1f\x8b\x08garbage that is no gzip")))
			remove(r, img)
		}, ErrNotFound},
		"bomb": {func(r *root, img image) {
			r.claim(img, 1, r.put(ocispec.MediaTypeImageLayerGzip, pack(r, bomb, compression.Gzip)))
		}, nil},
		"bomb, own missing": {func(r *root, img image) {
			r.claim(img, 1, r.put(ocispec.MediaTypeImageLayerGzip, pack(r, bomb, compression.Gzip)))
			remove(r, img)
		}, ErrNotFound},
		"huge, named by many": {func(r *root, img image) {
			huge := r.put(ocispec.MediaTypeImageLayer, archive(r, 7, 5<<20))
			for i := range 5 {
				other := archive(r, uint64(100+i), 10)
				r.finish(image{
					layers:  append(append([]ocispec.Descriptor{img.layers[0], huge}, img.layers[2]), r.put(ocispec.MediaTypeImageLayer, other)),
					diffIDs: append(append([]digest.Digest{}, img.diffIDs...), digest.FromBytes(other)),
				}, false)
			}
		}, nil},
		"encrypted, own missing": {func(r *root, img image) {
			r.claim(img, 1, encrypted(r))
			remove(r, img)
		}, ErrCannot},
		"encrypted, own good": {func(r *root, img image) { r.claim(img, 1, encrypted(r)) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRoot(t)
			img := r.image(compression.Gzip)
			c.make(r, img)
			s := Open(r.dir)
			var used []digest.Digest
			try := func() error {
				return s.Try(t.Context(), sizes(img.chains[1]), func(b Blob) error {
					used = append(used, b.Digest)
					_, err := extract(t, s, b)
					return err
				})
			}
			for range 2 {
				if err := try(); kindOf(err) != c.kind {
					t.Fatalf("error %v, want the kind %v", err, c.kind)
				}
			}
			for _, d := range used {
				if d != img.layers[1].Digest {
					t.Errorf("extracted from %s, which is not the layer's %s", d, img.layers[1].Digest)
				}
			}
			if c.kind == nil && len(used) != 2 {
				t.Errorf("%d calls for two layers", len(used))
			}
		})
	}
}

// TestTryOnlyLiar: when nothing else is there, a blob that is not the layer is read
// no further than a tar of the layer can be, and the answer is that the layer's blob
// is not in the store.
func TestTryOnlyLiar(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	bomb := r.put(ocispec.MediaTypeImageLayerGzip, pack(t, bytes.Repeat([]byte{0}, 80<<20), compression.Gzip))
	check(t, os.Remove(r.path(img.manifest.Digest)))
	r.claim(img, 1, bomb)
	r.claim(img, 2, img.layers[0])
	s := Open(r.dir)
	check(t, os.Remove(r.path(img.layers[1].Digest)))
	check(t, os.Remove(r.path(img.layers[2].Digest)))
	for _, chain := range img.chains[1:] {
		found, err := s.Find(t.Context(), sizes(chain))
		check(t, err)
		var most int64
		for _, b := range found {
			read, err := extract(t, s, b)
			if most = max(most, read); !errors.Is(err, ErrNotLayer) || errors.Is(err, ErrCorrupt) {
				t.Errorf("reading %s: %v", b.Digest, err)
			}
		}
		if limit := sizes(chain).limit() + 1<<20; most > limit {
			t.Errorf("%d bytes were read, bound %d", most, limit)
		}
		err = s.Try(t.Context(), sizes(chain), func(b Blob) error { _, err := extract(t, s, b); return err })
		if !errors.Is(err, ErrNotFound) || !Bad(err) {
			t.Errorf("error %v", err)
		}
	}
}

// TestTryEnds with the first error that is the caller's own.
func TestTryEnds(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	r.image(compression.Zstd)
	own, calls := errors.New("the disk is full"), 0
	s := Open(r.dir)
	err := s.Try(t.Context(), sizes(img.chains[0]), func(b Blob) error {
		calls++
		return b.Blame(t.Context(), own)
	})
	if err != own || calls != 1 || Unusable(err) {
		t.Errorf("%d calls, error %v", calls, err)
	}
}

// TestStreamWithRightDigest: a blob that was stored as it is and cannot be
// decompressed is not corrupt.
func TestStreamWithRightDigest(t *testing.T) {
	r := newRoot(t)
	whole := pack(t, archive(t, 1, 20_000), compression.Gzip)
	img := r.finish(image{
		diffIDs: []digest.Digest{digest.FromString("some tar")},
		layers:  []ocispec.Descriptor{r.put(ocispec.MediaTypeImageLayerGzip, whole[:len(whole)/2])},
	}, false)
	s := Open(r.dir)
	err := s.Try(t.Context(), sizes(img.chains[0]), func(b Blob) error { _, err := extract(t, s, b); return err })
	if !errors.Is(err, ErrCannot) || Bad(err) {
		t.Errorf("error %v", err)
	}
}

// TestOutOfDescriptors: a process that cannot open anything has found nothing bad.
func TestOutOfDescriptors(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	known := Open(r.dir)
	b := r.wants(known, img.chains[0], img.layers[0].Digest)[0]
	r.settle()
	r.wants(known, img.chains[0], img.layers[0].Digest)
	var old unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &old))
	check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1, Max: old.Max}))
	_, finding := Open(r.dir).Find(t.Context(), sizes(img.chains[0]))
	_, opening := b.Layer(t.Context())
	verifying := b.Verify(t.Context())
	check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &old))
	for what, err := range map[string]error{"find": finding, "open": opening, "verify": verifying} {
		if !errors.Is(err, ErrCannot) || !errors.Is(err, unix.EMFILE) || Bad(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestUnreadableManifest: it may be the one that names the layer.
func TestUnreadableManifest(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	check(t, os.Remove(r.path(img.manifest.Digest)))
	check(t, os.Symlink(r.path(img.manifest.Digest), r.path(img.manifest.Digest))) // ELOOP for root, too
	r.refusesAs(ErrCannot, Open(r.dir), img.chains[0], "skipped", "too many levels")
}

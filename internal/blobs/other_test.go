package blobs

import (
	"os"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// above is the wanted layer i of an image, with the chain ID of the layer below.
func above(img image, i int) Layer {
	l := sizes(img.chains[i])
	if i > 0 {
		l.Parent = img.chains[i-1].String()
	}
	return l
}

// sharing stores an image with the layer 1 of img as its second and last layer, in another
// compression, on another base.
func (r *root) sharing(img image) (other image) {
	r.Helper()
	for _, t := range [][]byte{archive(r, 77, 100), img.tars[1]} {
		other.diffIDs = append(other.diffIDs, digest.FromBytes(t))
		other.layers = append(other.layers, r.put(plain[compression.Zstd], pack(r, t, compression.Zstd)))
	}
	return r.finish(other, false)
}

// TestOtherImage: a layer of which its own image has no good blob, or no way to it, comes
// from another image that has the same tar as a layer, at whichever place.
func TestOtherImage(t *testing.T) {
	gone := func(r *root, d digest.Digest) { check(r, os.Remove(r.path(d))) }
	corrupt := func(r *root, d digest.Digest) {
		p := r.read(d)
		p[len(p)/2] ^= 0xff
		r.write(d, p)
	}
	for name, do := range map[string]func(r *root, img image){
		"blob gone":                    func(r *root, img image) { gone(r, img.layers[1].Digest) },
		"blob corrupt":                 func(r *root, img image) { corrupt(r, img.layers[1].Digest) },
		"blob and manifest gone":       func(r *root, img image) { gone(r, img.layers[1].Digest); gone(r, img.manifest.Digest) },
		"blob gone, manifest corrupt":  func(r *root, img image) { gone(r, img.layers[1].Digest); corrupt(r, img.manifest.Digest) },
		"blob and config gone":         func(r *root, img image) { gone(r, img.layers[1].Digest); gone(r, img.config.Digest) },
		"blob corrupt, config corrupt": func(r *root, img image) { corrupt(r, img.layers[1].Digest); corrupt(r, img.config.Digest) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRoot(t)
			img := r.image(compression.Gzip)
			other := r.sharing(img)
			s := Open(r.dir)
			do(r, img)
			var used []digest.Digest
			check(t, s.Try(t.Context(), above(img, 1), func(b Blob) error {
				if _, err := extract(t, s, b); err != nil {
					return err
				}
				used = append(used, b.Digest)
				return nil
			}))
			if want := []digest.Digest{other.layers[1].Digest}; !slices.Equal(used, want) {
				t.Errorf("used %v, want %v", used, want)
			}
			found, err := s.Find(t.Context(), above(img, 1))
			if err != nil || !slices.ContainsFunc(found, func(b Blob) bool { return b.Digest == used[0] }) {
				t.Errorf("Find returns %v, %v", found, err)
			}
		})
	}
}

// TestOwnComesFirst: another image's blob is not tried while the own one is good.
func TestOwnComesFirst(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	other := r.sharing(img)
	r.wants(Open(r.dir), img.chains[1], img.layers[1].Digest, other.layers[1].Digest)
	s := Open(r.dir)
	check(t, s.Try(t.Context(), above(img, 1), func(b Blob) error {
		if b.Digest != img.layers[1].Digest {
			t.Errorf("%s is tried", b.Digest)
		}
		return nil
	}))
}

// TestOtherImageLies: that a manifest names the diff ID of a layer proves nothing about its
// blob, and a diff ID is not guessed without the chain below.
func TestOtherImageLies(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	lie := r.put(plain[compression.Gzip], pack(r, archive(r, 88, 20_000), compression.Gzip))
	r.finish(image{layers: []ocispec.Descriptor{lie}, diffIDs: img.diffIDs[1:2]}, false)
	check(t, os.Remove(r.path(img.layers[1].Digest)))
	check(t, os.Remove(r.path(img.manifest.Digest)))
	s := Open(r.dir)
	err := s.Try(t.Context(), above(img, 1), func(b Blob) error { _, err := extract(t, s, b); return err })
	if kindOf(err) != ErrNotFound {
		t.Errorf("error %v", err)
	}
	if err := s.Try(t.Context(), sizes(img.chains[1]), func(Blob) error { return nil }); kindOf(err) != ErrNotFound {
		t.Errorf("without the chain below: %v", err)
	}
	encrypted := image{layers: []ocispec.Descriptor{r.put(images.MediaTypeImageLayerGzipEncrypted, []byte("cipher text"))}, diffIDs: img.diffIDs[1:2]}
	r.finish(encrypted, false)
	if err := Open(r.dir).Try(t.Context(), above(img, 1), func(Blob) error { return nil }); kindOf(err) != ErrCannot {
		t.Errorf("with an encrypted one: %v", err)
	}
}

// TestUnnamedBlob: the blob is there, and what led to it is not. It is found by what it
// holds, when a config or the caller knows the diff ID.
func TestUnnamedBlob(t *testing.T) {
	for name, c := range map[string]struct {
		lose  func(img image) digest.Digest
		knows bool // the caller, the diff ID
		found bool
	}{
		"manifest gone":                      {func(img image) digest.Digest { return img.manifest.Digest }, false, true},
		"config gone":                        {func(img image) digest.Digest { return img.config.Digest }, true, true},
		"config gone, diff ID not on record": {func(img image) digest.Digest { return img.config.Digest }, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRoot(t)
			img := r.image(compression.Gzip)
			check(t, os.Remove(r.path(c.lose(img))))
			want := above(img, 1)
			if c.knows {
				want.DiffID = img.diffIDs[1].String()
			}
			s := Open(r.dir)
			err := s.Try(t.Context(), want, func(b Blob) error {
				if b.Digest != img.layers[1].Digest {
					t.Errorf("%s is used", b.Digest)
				}
				_, err := extract(t, s, b)
				return err
			})
			if c.found && err != nil || !c.found && kindOf(err) != ErrNotFound {
				t.Errorf("error %v", err)
			}
		})
	}
}

// TestInOrder: of several sources each is asked only when those before it have nothing, and
// no layer is without a good blob while one of them could not be examined.
func TestInOrder(t *testing.T) {
	r, r2 := newRoot(t), newRoot(t)
	img := r.image(compression.Gzip)
	r2.image(compression.Zstd)
	first, second := Open(r.dir), Open(r2.dir)
	both := InOrder(first, second)
	use := func(b Blob) error { return b.Verify(t.Context()) }
	check(t, both.Try(t.Context(), above(img, 0), use))
	if len(second.index.files) > 0 {
		t.Error("the second source was read")
	}
	check(t, os.Remove(r.path(img.layers[0].Digest)))
	check(t, both.Try(t.Context(), above(img, 0), use))
	if found, err := both.Find(t.Context(), above(img, 0)); err != nil || found[0].MediaType != ocispec.MediaTypeImageLayerZstd {
		t.Errorf("found %v, %v", found, err)
	}
	for _, c := range []struct {
		other Source
		kind  error
	}{{Open(""), ErrNoStore}, {Open(newRoot(t).dir), ErrNoStore}, {first, ErrNotFound}} {
		for _, s := range []Source{InOrder(first, c.other), InOrder(c.other, first)} {
			if err := s.Try(t.Context(), above(img, 0), use); kindOf(err) != c.kind {
				t.Errorf("error %v, want the kind %v", err, c.kind)
			}
			if _, err := s.Find(t.Context(), above(img, 0)); kindOf(err) != c.kind {
				t.Errorf("Find: error %v, want the kind %v", err, c.kind)
			}
		}
	}
}

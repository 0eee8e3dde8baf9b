package blobs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestLayerIsTheTar(t *testing.T) {
	for how, mediaType := range plain {
		t.Run(mediaType, func(t *testing.T) {
			r := newRoot(t)
			img := r.image(how)
			s := Open(r.dir)
			for i, chain := range img.chains {
				b := r.wants(s, chain, img.layers[i].Digest)[0]
				check(t, b.Verify(t.Context()))
				l, err := b.Layer(t.Context())
				check(t, err)
				got, err := io.ReadAll(l)
				check(t, err)
				check(t, l.Close())
				if !bytes.Equal(got, img.tars[i]) || digest.FromBytes(got) != b.DiffID {
					t.Errorf("layer %d is not its tar", i)
				}
			}
		})
	}
}

// TestDamagedBlob: what Find cannot see, Verify does; a decompressor notices
// some of it.
func TestDamagedBlob(t *testing.T) {
	for how, mediaType := range plain {
		t.Run(mediaType, func(t *testing.T) {
			r := newRoot(t)
			img := r.image(how)
			s := Open(r.dir)
			for name, damage := range map[string]func([]byte){
				"first bit flipped":  func(p []byte) { p[0] ^= 1 },
				"middle bit flipped": func(p []byte) { p[len(p)/2] ^= 1 },
				"last bit flipped":   func(p []byte) { p[len(p)-1] ^= 1 },
				"zeros":              func(p []byte) { clear(p) },
				"tail of zeros":      func(p []byte) { clear(p[len(p)/2:]) },
			} {
				good := r.read(img.layers[0].Digest)
				bad := slices.Clone(good)
				if damage(bad); bytes.Equal(bad, good) {
					continue // a tar ends with zeros
				}
				r.write(img.layers[0].Digest, bad)
				b := r.wants(s, img.chains[0], img.layers[0].Digest)[0]
				err := b.Verify(t.Context())
				if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "has the content of "+digest.FromBytes(bad).String()) {
					t.Errorf("%s: Verify returns %v", name, err)
				}
				l, err := b.Layer(t.Context())
				if err == nil {
					var got []byte
					if got, err = io.ReadAll(l); err == nil && digest.FromBytes(got) == b.DiffID {
						t.Errorf("%s: the tar has the right diff ID", name)
					}
					check(t, l.Close())
				}
				if err != nil && !errors.Is(err, ErrCorrupt) {
					t.Errorf("%s: reading returns %v", name, err)
				}
				if name == "middle bit flipped" && how == compression.Gzip && err == nil {
					t.Error("gzip did not notice a flipped bit")
				}
				r.write(img.layers[0].Digest, good)
			}
		})
	}
}

// TestBlobChangesAfterFind: a blob is checked again whenever it is opened.
func TestBlobChangesAfterFind(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	s := Open(r.dir)
	b := r.wants(s, img.chains[0], img.layers[0].Digest)[0]
	for _, c := range []struct {
		damage func() error
		kind   error
		text   string
	}{
		{func() error { return os.Truncate(r.path(b.Digest), 9) }, ErrCorrupt, "has 9 bytes"},
		{func() error { return os.Remove(r.path(b.Digest)) }, ErrNotFound, "is missing"},
	} {
		check(t, c.damage())
		_, opening := s.ReaderAt(t.Context(), b.Descriptor)
		_, reading := b.Layer(t.Context())
		for _, err := range []error{opening, reading, b.Verify(t.Context())} {
			if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), "blob "+b.Digest.String()+" "+c.text) {
				t.Errorf("error %v", err)
			}
		}
	}
	b.MediaType = images.MediaTypeImageLayerEncrypted
	if _, err := b.Layer(t.Context()); !errors.Is(err, ErrCannot) || Bad(err) || !strings.Contains(err.Error(), "is encrypted") {
		t.Errorf("error %v", err)
	}
}

// TestReaderAt reads as containerd's own code does.
func TestReaderAt(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Zstd)
	p, err := content.ReadBlob(t.Context(), Open(r.dir), img.layers[1])
	check(t, err)
	if digest.FromBytes(p) != img.layers[1].Digest {
		t.Error("the blob is another")
	}
	config, err := images.RootFS(t.Context(), Open(r.dir), img.config)
	check(t, err)
	if !slices.Equal(config, img.diffIDs) {
		t.Errorf("diff IDs %v, want %v", config, img.diffIDs)
	}
}

// TestReadingEndsWithItsContext, at once and in the middle; neither is the
// blob's fault.
func TestReadingEndsWithItsContext(t *testing.T) {
	for how, mediaType := range plain {
		r := newRoot(t)
		a := archive(t, 1, 8<<20)
		img := r.finish(image{
			diffIDs: []digest.Digest{digest.FromBytes(a)},
			layers:  []ocispec.Descriptor{r.put(mediaType, pack(t, a, how))},
		}, false)
		s := Open(r.dir)
		b := r.wants(s, img.chains[0], img.layers[0].Digest)[0]
		ctx, cancel := context.WithCancel(t.Context())
		l, err := b.Layer(ctx)
		check(t, err)
		_, err = io.ReadFull(l, make([]byte, 1000))
		check(t, err)
		cancel()
		if _, err := io.Copy(io.Discard, l); !errors.Is(err, context.Canceled) || errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: reading returns %v", mediaType, err)
		}
		check(t, l.Close())
		if err := b.Verify(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: Verify returns %v", mediaType, err)
		}
	}
}

// TestLayerClosedEarly leaves no file open.
func TestLayerClosedEarly(t *testing.T) {
	for how := range plain {
		r := newRoot(t)
		img := r.image(how)
		s := Open(r.dir)
		b := r.wants(s, img.chains[0], img.layers[0].Digest)[0]
		l, err := b.Layer(t.Context())
		check(t, err)
		_, err = l.Read(make([]byte, 10))
		check(t, err)
		if !isOpen(t, r.path(b.Digest)) {
			t.Fatal("cannot see which files are open")
		}
		check(t, l.Close())
		if isOpen(t, r.path(b.Digest)) {
			t.Errorf("%s is still open", b.Digest)
		}
	}
}

func isOpen(t *testing.T, path string) bool {
	t.Helper()
	fds, err := filepath.Glob("/proc/self/fd/*")
	check(t, err)
	return slices.ContainsFunc(fds, func(fd string) bool {
		target, err := os.Readlink(fd)
		return err == nil && target == path // one may have been closed since
	})
}

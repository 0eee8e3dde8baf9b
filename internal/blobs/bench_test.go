package blobs

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// node is the content store of a node with 5,000 blobs: 250 images of 18 layers
// each, most of them too large for a manifest. It returns the chain IDs.
func node(b *testing.B) (*root, []digest.Digest) {
	b.Helper()
	r := newRoot(b)
	dir := filepath.Join(r.dir, "blobs/sha256")
	check(b, os.MkdirAll(dir, 0o755))
	var chains []digest.Digest
	for i := range 250 {
		var img image
		for l := range 18 {
			name := fmt.Sprint("layer ", i, " ", l)
			d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString(name), Size: 1 << (12 + l)}
			img.layers = append(img.layers, d)
			img.diffIDs = append(img.diffIDs, digest.FromString("tar of "+name))
			check(b, os.WriteFile(r.path(d.Digest), []byte("\x1f\x8b"), 0o444))
			check(b, os.Truncate(r.path(d.Digest), d.Size))
		}
		chains = append(chains, r.finish(img, false).chains...)
	}
	r.settle()
	return r, chains
}

// BenchmarkFirstFind makes the index of 5,000 blobs; their names and inodes are
// in the kernel's caches.
func BenchmarkFirstFind(b *testing.B) {
	r, chains := node(b)
	for b.Loop() {
		if _, err := Open(r.dir).Find(b.Context(), Layer{ChainID: chains[0].String()}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFind finds chain IDs that are there, with nothing new on disk.
func BenchmarkFind(b *testing.B) {
	r, chains := node(b)
	s := Open(r.dir)
	for i := 0; b.Loop(); i++ {
		if _, err := s.Find(b.Context(), Layer{ChainID: chains[i%len(chains)].String()}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFindUnknown searches for one that is not, so that everything is read again.
func BenchmarkFindUnknown(b *testing.B) {
	r, chains := node(b)
	s := Open(r.dir)
	unknown := digest.FromString("unknown")
	r.wants(s, chains[0], digest.FromString("layer 0 0"))
	for b.Loop() {
		if _, err := s.Find(b.Context(), Layer{ChainID: unknown.String()}); err == nil {
			b.Fatal("found")
		}
	}
}

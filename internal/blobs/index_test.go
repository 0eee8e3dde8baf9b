package blobs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// opened returns a function that reports whether a file or directory was opened
// or read since its last call.
func opened(t testing.TB, path string) func() bool {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	_, err = unix.InotifyAddWatch(fd, path, unix.IN_OPEN|unix.IN_ACCESS|unix.IN_DONT_FOLLOW)
	check(t, err)
	return func() bool {
		var events [64 << 10]byte
		n, err := unix.Read(fd, events[:])
		if !errors.Is(err, unix.EAGAIN) {
			check(t, err)
		}
		return n > 0
	}
}

// settle makes the directories of a store appear as if nothing was done to them
// for an hour.
func (r *root) settle() {
	r.Helper()
	then := time.Now().Add(-time.Hour)
	for _, dir := range []string{"blobs", "blobs/sha256"} {
		check(r, os.Chtimes(filepath.Join(r.dir, dir), then, then))
	}
}

// TestLargeBlobsAreNotOpened: a node has hundreds of gigabytes of them.
func TestLargeBlobsAreNotOpened(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	large := digest.FromString("stands for 100 MiB")
	check(t, os.WriteFile(r.path(large), []byte(`{"mediaType":`), 0o444))
	check(t, os.Truncate(r.path(large), 100<<20))
	largeOpened, manifestOpened := opened(t, r.path(large)), opened(t, r.path(img.manifest.Digest))
	s := Open(r.dir)
	r.wants(s, img.chains[0], img.layers[0].Digest)
	r.refuses(s, digest.FromString("unknown"))
	if !manifestOpened() {
		t.Fatal("the watch does not see that a blob is opened")
	}
	if largeOpened() {
		t.Error("a blob of 100 MiB was opened")
	}
}

// TestSmallLayersAreSniffed: of a layer that is small enough for a manifest only
// the first bytes are read.
func TestSmallLayersAreSniffed(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	for i := range 50 {
		r.put(ocispec.MediaTypeImageLayer, archive(t, uint64(i), 1<<20))
	}
	before := charsRead(t)
	r.wants(Open(r.dir), img.chains[0], img.layers[0].Digest)
	if n := charsRead(t) - before; n > 100<<10 {
		t.Errorf("%d bytes were read to distinguish 50 layers of 1 MiB from manifests", n)
	}
}

// charsRead is how many bytes this process has read, proc(5).
func charsRead(t testing.TB) (n int64) {
	t.Helper()
	f, err := os.Open("/proc/self/io")
	check(t, err)
	defer f.Close()
	var word string
	if _, err := fmt.Fscan(f, &word, &n); err != nil || word != "rchar:" {
		t.Fatal(word, err)
	}
	return n
}

// TestFindRemembers: without changes on disk, neither directories nor blobs are
// read again for a chain that is there; blobs are not for one that is not.
func TestFindRemembers(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	r.settle()
	s := Open(r.dir)
	r.wants(s, img.chains[0], img.layers[0].Digest)
	listed, read := opened(t, filepath.Join(r.dir, "blobs/sha256")), opened(t, r.path(img.manifest.Digest))
	for i := range img.chains {
		r.wants(s, img.chains[i], img.layers[i].Digest)
	}
	if listed() || read() {
		t.Error("the store was read again for a chain that is known")
	}
	r.refuses(s, digest.FromString("unknown"))
	if !listed() {
		t.Error("the store was not read for a chain that is not known")
	}
	if read() {
		t.Error("a manifest was read again")
	}
}

// TestFindNotices what happens to a store after the first refresh, however recent
// that refresh is.
func TestFindNotices(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	s := Open(r.dir)
	r.wants(s, img.chains[2], img.layers[2].Digest)

	second := r.image(compression.Zstd)
	r.wants(s, img.chains[2], img.layers[2].Digest, second.layers[2].Digest)

	check(t, os.Remove(r.path(second.manifest.Digest)))
	r.wants(s, img.chains[2], img.layers[2].Digest)

	// Damage in place, with the size and the times of before.
	good := r.read(img.manifest.Digest)
	info, err := os.Stat(r.path(img.manifest.Digest))
	check(t, err)
	bad := append([]byte("{{"), good[2:]...)
	check(t, os.Chmod(r.path(img.manifest.Digest), 0o644))
	check(t, os.WriteFile(r.path(img.manifest.Digest), bad, 0o644))
	check(t, os.Chtimes(r.path(img.manifest.Digest), info.ModTime(), info.ModTime()))
	r.refuses(s, img.chains[2], "has the content of")

	r.write(img.manifest.Digest, good)
	r.wants(s, img.chains[2], img.layers[2].Digest)

	// A config that comes after its manifest.
	config := r.read(img.config.Digest)
	check(t, os.Remove(r.path(img.config.Digest)))
	s = Open(r.dir)
	r.refuses(s, img.chains[2], "its config", "is missing")
	r.put(ocispec.MediaTypeImageConfig, config)
	r.wants(s, img.chains[2], img.layers[2].Digest)
}

// TestFindUnknownLooksAnew even if the directories seem to be as they were.
func TestFindUnknownLooksAnew(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	r.settle()
	s := Open(r.dir)
	r.wants(s, img.chains[0], img.layers[0].Digest)
	info, err := os.Stat(filepath.Join(r.dir, "blobs/sha256"))
	check(t, err)
	a := archive(t, 9, 100)
	late := r.finish(image{diffIDs: []digest.Digest{digest.FromBytes(a)}, layers: []ocispec.Descriptor{r.put(ocispec.MediaTypeImageLayer, a)}}, false)
	check(t, os.Chtimes(filepath.Join(r.dir, "blobs/sha256"), info.ModTime(), info.ModTime()))
	r.wants(s, late.chains[0], late.layers[0].Digest)
}

// TestRecentDirectoriesAreNotTrusted: with a coarse clock, a directory may change
// after it was listed and keep its time.
func TestRecentDirectoriesAreNotTrusted(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	s := Open(r.dir)
	r.wants(s, img.chains[0], img.layers[0].Digest)
	if s.index.current() {
		t.Error("directories that changed just now are trusted")
	}
	r.settle()
	r.wants(s, img.chains[0], img.layers[0].Digest)
	if !s.index.current() {
		t.Error("directories that did not change for an hour are not trusted")
	}
}

// TestClocksThatJump: a board without a clock starts in 1970, or far ahead; what is
// stored after the clock was set is found all the same, and so is what is stored
// before.
func TestClocksThatJump(t *testing.T) {
	for _, then := range []time.Time{time.Unix(10, 0), time.Now().AddDate(72, 0, 0)} {
		r := newRoot(t)
		img := r.image(compression.Gzip)
		for _, dir := range []string{"blobs", "blobs/sha256"} {
			check(t, os.Chtimes(filepath.Join(r.dir, dir), then, then))
		}
		s := Open(r.dir)
		r.wants(s, img.chains[0], img.layers[0].Digest)
		if trusted := s.index.current(); trusted != then.Before(time.Now()) {
			t.Errorf("a directory of %v is trusted: %v", then, trusted)
		}
		second := r.image(compression.Zstd)
		r.wants(s, img.chains[0], img.layers[0].Digest, second.layers[0].Digest)
	}
}

// lasting is a context that ends after some calls of Err.
type lasting struct {
	context.Context
	left int
}

func (l *lasting) Err() error {
	if l.left--; l.left < 0 {
		return context.DeadlineExceeded
	}
	return nil
}

// TestFindGoesOnWhereItWasCut: on a cold disk, a deadline that is too short for
// all blobs must not be too short for ever.
func TestFindGoesOnWhereItWasCut(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	s := Open(r.dir)
	for _, n := range []int{3, 5} {
		_, err := s.Find(&lasting{t.Context(), n}, Layer{ChainID: img.chains[0].String()})
		if !errors.Is(err, context.DeadlineExceeded) || len(s.index.files) != n {
			t.Fatalf("%d blobs of %d are known, error %v", len(s.index.files), n, err)
		}
	}
	var first []func() bool
	for d := range s.index.files {
		first = append(first, opened(t, r.path(d)))
	}
	r.wants(s, img.chains[0], img.layers[0].Digest)
	again := 0
	for _, o := range first {
		if o() {
			again++
		}
	}
	// The config may be among them: it is read when its manifest is known.
	if again > 1 {
		t.Errorf("%d blobs were opened again", again)
	}
}

// TestFindEndsWithItsContext, while it reads and while it waits for another caller.
func TestFindEndsWithItsContext(t *testing.T) {
	r := newRoot(t)
	img := r.image(compression.Gzip)
	s := Open(r.dir)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Find(ctx, Layer{ChainID: img.chains[0].String()}); !errors.Is(err, context.Canceled) || errors.Is(err, ErrNotFound) {
		t.Errorf("reading: %v", err)
	}

	s.busy <- struct{}{}
	soon, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := s.Find(soon, Layer{ChainID: img.chains[0].String()}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting: %v", err)
	}
	<-s.busy
	r.wants(s, img.chains[0], img.layers[0].Digest)
}

// TestOneLookServesAllWhoWait: a burst of questions for what is not there, as
// after the loss of a disk, must not list the store once for each.
func TestOneLookServesAllWhoWait(t *testing.T) {
	r := newRoot(t)
	r.image(compression.Gzip)
	r.settle()
	s := Open(r.dir)
	unknown := digest.FromString("unknown")
	asked := time.Now()
	r.refuses(s, unknown)
	listed := opened(t, filepath.Join(r.dir, "blobs/sha256"))
	if _, _, err := s.named(t.Context(), Layer{ChainID: unknown.String()}, asked); !errors.Is(err, ErrNotFound) || listed() {
		t.Errorf("a refresh that began after the call was not used; error %v", err)
	}
	if _, _, err := s.named(t.Context(), Layer{ChainID: unknown.String()}, time.Now()); !errors.Is(err, ErrNotFound) || !listed() {
		t.Errorf("a refresh from before the call was used; error %v", err)
	}
}

package blobs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/internal/inflate"
)

var _ content.Provider = (*Store)(nil)

// ReaderAt opens a blob. The error wraps ErrNotFound when it is missing,
// ErrCorrupt when its size is not that of the descriptor, and ErrNoStore or
// ErrCannot when it could not be opened for another reason. Its content is not
// examined.
func (s *Store) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if s.root == "" {
		return nil, s.noStore("")
	}
	if err := desc.Digest.Validate(); err != nil {
		return nil, notFound("blob %q: %v", desc.Digest, err)
	}
	if err := s.present(desc); err != nil {
		return nil, fmt.Errorf("blob %s %w", desc.Digest, err)
	}
	blob, err := local.OpenReader(s.path(desc.Digest))
	if errdefs.IsNotFound(err) {
		return nil, notFound("blob %s is missing", desc.Digest)
	}
	if err != nil {
		return nil, cannot(err, "open blob %s", desc.Digest)
	}
	return blob, nil
}

// File opens the file of a blob, with the errors of ReaderAt.
func (s *Store) File(desc ocispec.Descriptor) (*os.File, error) {
	blob, err := s.ReaderAt(context.Background(), desc) // it examines, and costs no reading
	if err != nil {
		return nil, err
	}
	_ = blob.Close() // nothing was read
	file, err := os.Open(s.path(desc.Digest))
	if errors.Is(err, os.ErrNotExist) {
		return nil, notFound("blob %s is missing", desc.Digest)
	}
	if err != nil {
		return nil, cannot(err, "open blob %s", desc.Digest)
	}
	return file, nil
}

// Open returns the bytes of a blob in the store, as [Store.ReaderAt] does.
func (s *Store) Open(ctx context.Context, b Blob) (io.ReadCloser, error) {
	blob, err := s.ReaderAt(ctx, b.Descriptor)
	if err != nil {
		return nil, err
	}
	return readCloser{content.NewReader(blob), blob}, nil
}

type readCloser struct {
	io.Reader
	io.Closer
}

// Raw returns the bytes of a blob as they lie in its origin. Reading ends with ctx.
func (b Blob) Raw(ctx context.Context) (io.ReadCloser, error) { return b.source(ctx) }

// Verify reads a whole blob. The error wraps ErrCorrupt when its content does
// not have the digest that is its name. A blob of an archive may have no name; then it
// is the diff ID that counts.
func (b Blob) Verify(ctx context.Context) error {
	if b.Digest == "" {
		return b.verifyTar(ctx)
	}
	src, err := b.source(ctx)
	if err != nil {
		return err
	}
	defer src.Close()
	digester := b.Digest.Algorithm().Digester()
	if _, err := io.CopyBuffer(digester.Hash(), src, make([]byte, 1<<20)); err != nil {
		return readError(err, b)
	}
	if is := digester.Digest(); is != b.Digest {
		return corrupt("%v has the content of %s", b, is)
	}
	return nil
}

// verifyTar is Verify for a blob without a digest.
func (b Blob) verifyTar(ctx context.Context) error {
	src, err := b.source(ctx)
	if err != nil {
		return err
	}
	defer src.Close()
	tar, err := inflate.Stream(src)
	if err == nil {
		defer tar.Close()
		digester := b.DiffID.Algorithm().Digester()
		most := int64(math.MaxInt64)
		if b.limit > 0 {
			most = b.limit
		}
		if _, err = io.CopyBuffer(digester.Hash(), io.LimitReader(tar, most), make([]byte, 1<<20)); err == nil && digester.Digest() == b.DiffID {
			return nil
		}
	}
	if failed := src.failure(); failed != nil {
		return readError(failed, b)
	}
	if err == nil {
		err = errors.New("it holds another tar")
	}
	return corrupt("%v is not the layer %s: %v", b, b.DiffID, err)
}

// readError gives an error of reading a blob a kind, unless it has one.
func readError(err error, b Blob) error {
	if kindOf(err) != nil {
		return err
	}
	return cannot(err, "read %v", b)
}

// Blame returns the error that a caller had with the tar of a blob. It wraps
// ErrCorrupt if the blob is: a tar that is not compressed has no checksum, and
// damage of it shows as any error of reading a tar. It wraps ErrNotLayer if the
// blob is intact and holds another tar than the layer's. When the tar is the
// layer's, the blob has nothing to do with the error, which is returned as it is.
func (b Blob) Blame(ctx context.Context, err error) error {
	if kindOf(err) != nil || ctx.Err() != nil {
		return err
	}
	if bad := b.prove(ctx); kindOf(bad) != nil {
		return fmt.Errorf("%w: %w", bad, err)
	}
	return err
}

// Mismatch is the error for a blob whose tar, read to its end, has the digest got
// and not its diff ID. It wraps ErrCorrupt when the blob is corrupt, else
// ErrNotLayer.
func (b Blob) Mismatch(ctx context.Context, got digest.Digest) error {
	return b.notLayer(ctx, fmt.Sprintf("%v holds %s, the layer is %s", b, got, b.DiffID))
}

func (b Blob) notLayer(ctx context.Context, text string) error {
	if b.Digest != "" {
		if err := b.Verify(ctx); err != nil {
			return err
		}
	}
	err := &problem{kind: ErrNotLayer, text: text}
	b.origin.Remember(b, err)
	return err
}

// proof is that a blob was decompressed to its end.
type proof struct{ blob, diffID digest.Digest }

// proofResult is what it held: err is nil for the layer, else of ErrNotLayer.
type proofResult struct {
	id  fileID
	err error
}

// prove decompresses a blob without writing anything, and returns nil when it
// holds the tar of the layer. What was found once is remembered as long as the
// file does not change.
func (b Blob) prove(ctx context.Context) error {
	if known, err := b.origin.Remembered(b); known {
		return err
	}
	l, err := b.Layer(ctx)
	if err != nil {
		return err
	}
	defer l.Close()
	digester := b.DiffID.Algorithm().Digester()
	if _, err := io.CopyBuffer(digester.Hash(), l, make([]byte, 1<<20)); err != nil {
		return err
	}
	if got := digester.Digest(); got != b.DiffID {
		return b.Mismatch(ctx, got)
	}
	b.origin.Remember(b, nil)
	return nil
}

// Remember is for [Origin].
func (s *Store) Remember(b Blob, result error) {
	info, err := os.Stat(s.path(b.Digest))
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.proven[proof{b.Digest, b.DiffID}] = proofResult{idOf(info), result}
}

// Remembered is for [Origin].
func (s *Store) Remembered(b Blob) (known bool, result error) {
	s.mu.Lock()
	r, known := s.proven[proof{b.Digest, b.DiffID}]
	s.mu.Unlock()
	if !known {
		return false, nil
	}
	info, err := os.Stat(s.path(b.Digest))
	return err == nil && idOf(info) == r.id, r.err
}

// errStream is wrapped by the error of a blob with the right digest that is not a
// stream of its compression.
var errStream = errors.New("not a valid compressed stream")

// Layer returns the tar of a blob, decompressed in this process: containerd runs
// igzip or unpigz for gzip when it finds them, and a child that was killed or
// could not be started is hard to distinguish from a blob that cannot be decompressed.
//
// Reading it ends with ctx. Errors of reading wrap ErrCorrupt when it cannot be
// decompressed and its digest is wrong, ErrCannot when its digest is right, and
// ErrNotLayer when it holds more than the layer can be. A blob that can be
// decompressed may still be another, so the caller must compare the diff ID of
// what was read, and that means all of it: a tar ends before its stream does; see
// Mismatch. Close checks nothing.
func (b Blob) Layer(ctx context.Context) (io.ReadCloser, error) {
	if err := Extractable(b.MediaType); err != nil {
		return nil, fmt.Errorf("%v %w", b, err)
	}
	src, err := b.source(ctx)
	if err != nil {
		return nil, err
	}
	l := &layer{blob: b, src: src}
	if l.tar, err = inflate.Stream(src); err != nil {
		src.Close()
		return nil, l.blame(err)
	}
	return l, nil
}

// source is a blob as a stream.
type source struct {
	io.ReadCloser
	ctx context.Context

	mu     sync.Mutex // decompressors read in goroutines of their own
	failed error      // guarded by mu
}

func (b Blob) source(ctx context.Context) (*source, error) {
	blob, err := b.origin.Open(ctx, b)
	if err != nil {
		return nil, err
	}
	return &source{ReadCloser: blob, ctx: ctx}, nil
}

func (src *source) Read(p []byte) (int, error) {
	n, err := 0, src.ctx.Err()
	if err == nil {
		n, err = src.ReadCloser.Read(p)
	}
	if err != nil && err != io.EOF {
		src.mu.Lock()
		src.failed = err
		src.mu.Unlock()
	}
	return n, err
}

// failure returns the error with which reading the blob has ended, nil when it was none of
// the blob's place.
func (src *source) failure() error {
	src.mu.Lock()
	defer src.mu.Unlock()
	return src.failed
}

// layer is a stream whose errors distinguish bad blobs from bad disks.
type layer struct {
	blob Blob
	src  *source
	tar  io.ReadCloser
	read int64
}

func (l *layer) Read(p []byte) (int, error) {
	n, err := l.tar.Read(p)
	l.read += int64(n)
	switch {
	case err != nil && err != io.EOF:
		err = l.blame(err)
	case l.blob.limit > 0 && l.read > l.blob.limit:
		n, err = 0, l.blob.notLayer(l.src.ctx, fmt.Sprintf("%v holds more than %d bytes, which no tar of a layer of this size has", l.blob, l.blob.limit))
	}
	return n, err
}

// blame finds the cause of an error of decompressing.
func (l *layer) blame(err error) error {
	if failed := l.src.failure(); failed != nil {
		return readError(failed, l.blob)
	}
	if bad := l.blob.Verify(l.src.ctx); bad != nil {
		return fmt.Errorf("%w: decompress: %v", bad, err)
	}
	return cannot(fmt.Errorf("%w: %w", errStream, err), "decompress %v, whose digest is right", l.blob)
}

func (l *layer) Close() error {
	l.tar.Close()
	return l.src.Close()
}

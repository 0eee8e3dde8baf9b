package blobs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var _ content.Provider = (*Store)(nil)

// ReaderAt opens a blob. The error wraps ErrNotFound when it is missing and
// ErrCorrupt when its size is not that of the descriptor. What is in it is not
// looked at.
func (s *Store) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, notFound("blob %q: %v", desc.Digest, err)
	}
	if s.root == "" {
		return nil, notFound("blob %s: there is no content store to look into", desc.Digest)
	}
	if err := s.present(desc); err != nil {
		return nil, fmt.Errorf("blob %s %w", desc.Digest, err)
	}
	blob, err := local.OpenReader(s.path(desc.Digest))
	if errdefs.IsNotFound(err) {
		return nil, notFound("blob %s is missing", desc.Digest)
	}
	return blob, err
}

// Verify reads a whole blob. The error wraps ErrCorrupt when its content is not
// what its digest says.
func (s *Store) Verify(ctx context.Context, b Blob) error {
	src, err := s.source(ctx, b)
	if err != nil {
		return err
	}
	defer src.Close()
	digester := b.Digest.Algorithm().Digester()
	if _, err := io.CopyBuffer(digester.Hash(), src, make([]byte, 1<<20)); err != nil {
		return fmt.Errorf("read blob %s: %w", b.Digest, err)
	}
	if is := digester.Digest(); is != b.Digest {
		return corrupt("blob %s has the content of %s", b.Digest, is)
	}
	return nil
}

// Blame returns the error that somebody had with the tar of a blob. It wraps
// ErrCorrupt if the blob is: a tar that is not compressed has no checksum, and a
// damage of it shows as anything that a tar can say.
func (s *Store) Blame(ctx context.Context, b Blob, err error) error {
	if errors.Is(err, ErrCorrupt) {
		return err
	}
	if bad := s.Verify(ctx, b); errors.Is(bad, ErrCorrupt) {
		return fmt.Errorf("%w: %w", bad, err)
	}
	return err
}

// Layer returns the tar of a blob, decompressed. Reading it ends with ctx.
// Errors of reading wrap ErrCorrupt when it cannot be decompressed; a blob that
// can be may still be another, so whoever reads it must check the diff ID of
// what was read, and that means all of it: a tar ends before its stream does.
// Close checks nothing.
func (s *Store) Layer(ctx context.Context, b Blob) (io.ReadCloser, error) {
	if err := extractable(b.MediaType); err != nil {
		return nil, notFound("blob %s %v", b.Digest, err)
	}
	src, err := s.source(ctx, b)
	if err != nil {
		return nil, err
	}
	l := &layer{digest: b.Digest, src: src}
	if l.tar, err = compression.DecompressStream(src); err != nil {
		src.Close()
		return nil, l.blame(err)
	}
	return l, nil
}

// source is a blob as a stream.
type source struct {
	io.Reader
	blob content.ReaderAt
	ctx  context.Context

	mu     sync.Mutex // decompressors read in goroutines of their own
	failed error      // guarded by mu
}

func (s *Store) source(ctx context.Context, b Blob) (*source, error) {
	blob, err := s.ReaderAt(ctx, b.Descriptor)
	if err != nil {
		return nil, err
	}
	return &source{Reader: content.NewReader(blob), blob: blob, ctx: ctx}, nil
}

func (src *source) Read(p []byte) (int, error) {
	n, err := 0, src.ctx.Err()
	if err == nil {
		n, err = src.Reader.Read(p)
	}
	if err != nil && err != io.EOF {
		src.mu.Lock()
		src.failed = err
		src.mu.Unlock()
	}
	return n, err
}

func (src *source) Close() error { return src.blob.Close() }

// layer is a stream that tells bad blobs from bad disks.
type layer struct {
	digest digest.Digest
	src    *source
	tar    io.ReadCloser
}

func (l *layer) Read(p []byte) (int, error) {
	n, err := l.tar.Read(p)
	if err != nil && err != io.EOF {
		err = l.blame(err)
	}
	return n, err
}

// blame says what an error of decompressing comes from.
func (l *layer) blame(err error) error {
	l.src.mu.Lock()
	defer l.src.mu.Unlock()
	if l.src.failed != nil {
		return fmt.Errorf("read blob %s: %w", l.digest, l.src.failed)
	}
	return corrupt("decompress blob %s: %v", l.digest, err)
}

func (l *layer) Close() error {
	l.tar.Close()
	return l.src.Close()
}

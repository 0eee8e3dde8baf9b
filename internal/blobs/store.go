package blobs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// What can be wrong with a blob. Neither is an error of containerd's errdefs:
// NotFound would say at the gRPC edge that the snapshot is not there.
var (
	// ErrNotFound is returned when the store does not have what is asked for.
	ErrNotFound = errors.New("not in the content store")
	// ErrCorrupt is returned when it does, and it is not what its name says.
	ErrCorrupt = errors.New("damaged in the content store")
)

// problem is an error with a text of its own and one of the kinds above.
type problem struct {
	kind error
	text string
}

func (p *problem) Error() string { return p.text }
func (p *problem) Unwrap() error { return p.kind }

func notFound(format string, args ...any) error {
	return &problem{ErrNotFound, fmt.Sprintf(format, args...)}
}

func corrupt(format string, args ...any) error {
	return &problem{ErrCorrupt, fmt.Sprintf(format, args...)}
}

// Blob is a layer as it came from a registry: Descriptor has its media type,
// digest and size. DiffID is the digest of the tar in it.
type Blob struct {
	ocispec.Descriptor
	DiffID digest.Digest
}

// Store is a content store on disk.
type Store struct {
	root string
	// busy holds a token while somebody uses the index. It is a channel so that
	// a caller who waits for it can give up.
	busy  chan struct{}
	index index
}

// Open returns the store in root, the directory that containerd calls
// io.containerd.content.v1.content. Nothing is read yet, and root need not
// exist. With an empty root nothing is ever found.
func Open(root string) *Store {
	return &Store{root: root, busy: make(chan struct{}, 1)}
}

func (s *Store) dir() string { return filepath.Join(s.root, "blobs") }

func (s *Store) path(d digest.Digest) string {
	return filepath.Join(s.dir(), d.Algorithm().String(), d.Encoded())
}

// Find returns the blobs that the layer with this chain ID can be extracted
// from: present, of the right size, and of a kind that can be extracted. There
// are several when manifests name different ones, one compressed with gzip and
// one with zstd for example; any will do. When there is none, the error wraps
// ErrNotFound and says why. Other errors are those of ctx and of the disk.
func (s *Store) Find(ctx context.Context, chainID string) ([]Blob, error) {
	if s.root == "" {
		return nil, notFound("chain ID %s: there is no content store to look into", chainID)
	}
	if err := digest.Digest(chainID).Validate(); err != nil {
		return nil, notFound("%q is not a chain ID: %v", chainID, err)
	}
	named, err := s.named(ctx, digest.Digest(chainID), time.Now())
	if err != nil {
		return nil, err
	}
	var found []Blob
	var reasons []string
	for _, b := range named {
		err := extractable(b.MediaType)
		if err == nil {
			err = s.present(b.Descriptor)
		}
		switch same := func(other Blob) bool { return other.Digest == b.Digest }; {
		case err != nil:
			reasons = append(reasons, fmt.Sprintf("its blob %s %v", b.Digest, err))
		case !slices.ContainsFunc(found, same):
			found = append(found, b)
		}
	}
	if len(found) == 0 {
		return nil, notFound("chain ID %s: %s", chainID, strings.Join(reasons, "; "))
	}
	return found, nil
}

// named returns what manifests say of a chain ID: never nothing without an error.
func (s *Store) named(ctx context.Context, chain digest.Digest, asked time.Time) ([]Blob, error) {
	select {
	case s.busy <- struct{}{}:
		defer func() { <-s.busy }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if !s.index.current() {
		if err := s.index.refresh(ctx, s.dir()); err != nil {
			return nil, fmt.Errorf("look for chain ID %s: %w", chain, err)
		}
	}
	// What is not there may have come in a way that directories do not show. One
	// look serves all who asked before it began.
	if len(s.index.chains[chain]) == 0 && s.index.read.Before(asked) {
		if err := s.index.refresh(ctx, s.dir()); err != nil {
			return nil, fmt.Errorf("look for chain ID %s: %w", chain, err)
		}
	}
	if found := s.index.chains[chain]; len(found) > 0 {
		return found, nil
	}
	text := fmt.Sprintf("no manifest in %s names chain ID %s", s.dir(), chain)
	if over := s.index.over; len(over) > 0 {
		text += fmt.Sprintf("; passed over: %s", strings.Join(over[:min(3, len(over))], "; "))
		if len(over) > 3 {
			text += fmt.Sprintf("; and %d more", len(over)-3)
		}
	}
	return nil, notFound("%s", text)
}

// present returns what keeps the file of a blob from being the blob, as far as
// one can tell without reading it.
func (s *Store) present(desc ocispec.Descriptor) error {
	info, err := os.Stat(s.path(desc.Digest))
	switch {
	case errors.Is(err, fs.ErrNotExist) && images.IsNonDistributable(desc.MediaType):
		return notFound("is missing: it is a foreign layer, which registries need not have")
	case errors.Is(err, fs.ErrNotExist):
		return notFound("is missing")
	case err != nil:
		return fmt.Errorf("cannot be looked at: %w", err)
	case !info.Mode().IsRegular():
		return corrupt("is not a file")
	case info.Size() != desc.Size:
		return corrupt("has %d bytes, %d expected", info.Size(), desc.Size)
	}
	return nil
}

// extractable returns why layers of a media type cannot be extracted.
func extractable(mediaType string) error {
	base, suffix, _ := strings.Cut(mediaType, "+")
	if slices.Contains(strings.Split(suffix, "+"), "encrypted") {
		return fmt.Errorf("is encrypted (%s)", mediaType)
	}
	known := suffix == "" || suffix == "gzip" || suffix == "zstd"
	// What the suffix promises does not matter: the first bytes of a blob tell.
	if _, err := images.DiffCompression(context.Background(), base); err != nil || !known {
		return fmt.Errorf("is not a tar (%s)", mediaType)
	}
	return nil
}

package blobs

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Source is where blobs of layers can come from.
type Source interface {
	// Find is as [Store.Find].
	Find(ctx context.Context, want Layer) ([]Blob, error)
	// Try is as [Store.Try].
	Try(ctx context.Context, want Layer, use func(Blob) error) error
}

// Origin is what a blob lies in. It may be used from several goroutines.
type Origin interface {
	// Open returns the bytes of a blob. Errors have the kinds of this package, also those of
	// reading: what its origin cannot read is ErrCannot, and what its origin turns out not to
	// have is ErrCorrupt.
	Open(ctx context.Context, b Blob) (io.ReadCloser, error)
	// Remember keeps what a blob was found to hold, nil for its layer, and Remembered
	// returns that for as long as the file has not changed.
	Remember(b Blob, result error)
	Remembered(b Blob) (known bool, result error)
}

// NewBlob returns a blob of a wanted layer that lies outside of a content store.
func NewBlob(o Origin, place string, desc ocispec.Descriptor, diffID digest.Digest, want Layer) Blob {
	return Blob{Descriptor: desc, DiffID: diffID, Place: place, origin: o, limit: want.limit()}
}

// Problem is an error of one of the kinds of this package, for sources outside of it. The
// cause, which may be nil, is wrapped, too; that of a context that has ended stays without a
// kind.
func Problem(kind, cause error, format string, args ...any) error {
	if kind == ErrCannot && cause != nil {
		return cannot(cause, format, args...)
	}
	return &problem{kind, fmt.Sprintf(format, args...), cause}
}

// TryEach is the part of Try of each source: found are the blobs, the most trusted first, and
// reasons are why others cannot be used. With prove, a blob is read and decompressed before
// use is called with it.
func TryEach(ctx context.Context, want Layer, found []Blob, reasons []error, prove bool, use func(Blob) error) error {
	for _, b := range found {
		var err error
		if prove {
			err = b.prove(ctx)
			// A stream with the right digest that is none is not what containerd has
			// extracted. Without a rival, our decompressor may be to blame.
			if errors.Is(err, errStream) {
				err = &problem{ErrNotLayer, b.String(), err}
			}
		}
		if err == nil {
			if err = use(b); err == nil {
				b.origin.Remember(b, nil)
				return nil
			}
		}
		if kindOf(err) == nil || ctx.Err() != nil {
			return err
		}
		reasons = append(reasons, err)
	}
	return verdict(want, reasons)
}

// InOrder returns a source that asks others, each only when those before it have no
// usable blob. The error of all has the kind that describes them together: as long as one
// of them could not be examined, no layer is without a good blob.
func InOrder(sources ...Source) Source { return inOrder(sources) }

type inOrder []Source

func (o inOrder) Find(ctx context.Context, want Layer) (found []Blob, err error) {
	var reasons []error
	for _, s := range o {
		if found, err = s.Find(ctx, want); err == nil {
			return found, nil
		}
		if kindOf(err) == nil || ctx.Err() != nil {
			return nil, err
		}
		reasons = append(reasons, err)
	}
	return nil, joined(reasons)
}

func (o inOrder) Try(ctx context.Context, want Layer, use func(Blob) error) error {
	var reasons []error
	for _, s := range o {
		err := s.Try(ctx, want, use)
		if err == nil || kindOf(err) == nil || ctx.Err() != nil {
			return err
		}
		reasons = append(reasons, err)
	}
	return joined(reasons)
}

// joined is the error of several sources. That of a single one is returned as it is.
func joined(reasons []error) error {
	if len(reasons) == 1 {
		return reasons[0]
	}
	text, kind := combine(reasons)
	return &problem{kind: kind, text: text}
}

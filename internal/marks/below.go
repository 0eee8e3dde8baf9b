package marks

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
)

// Parent is a committed layer below another one.
type Parent struct {
	ID       uint64 // of its directory
	Name     string // of its row
	Sequence uint64 // of its commit
	Digest   string // of its seal; "" when it was never sealed
	Tree     string // its fs/; the seal lies beside it
}

func (p Parent) seal() string { return filepath.Join(filepath.Dir(p.Tree), layout.SealFile) }

// Trees returns the trees of a chain, topmost first.
func Trees(chain []Parent) []string {
	trees := make([]string, len(chain))
	for i, p := range chain {
		trees[i] = p.Tree
	}
	return trees
}

// Chain is the parent chain of a layer. Trees of the chain may be exchanged, by
// heals, while it is read.
type Chain interface {
	// Parents returns the chain, topmost first.
	Parents(ctx context.Context) ([]Parent, error)
	// Exchanged reports whether a layer has another tree now: it was healed.
	Exchanged(ctx context.Context, p Parent) bool
	// Suspect causes a layer to be verified, because its seal could not be used, and
	// returns the error of the operation that has met it, a BelowError. It does not
	// wait for the verification.
	Suspect(ctx context.Context, p Parent, why error) error
}

// below resolves queries from the layers below one.
type below struct {
	chain Chain
	known []Parent // what Chain.Parents has returned before, if it was called
}

// query is resolved by the layers of a chain, one after another: seal.Dirs,
// seal.Top.
type query interface {
	Open() bool
	Forget()
	Below(tree, file, digest string) error
	BelowTree(tree string) error
}

// BelowError means that a layer below cannot be read. It is no evidence about the
// layer above, and is Unavailable to containerd, whose unpacker removes the
// extraction and fails the pull for every error of Commit but AlreadyExists
// (core/unpack/unpacker.go:560). The next pull extracts again.
type BelowError struct{ Err error }

// Error implements error.
func (e *BelowError) Error() string { return e.Err.Error() }

// Unwrap returns the error and its kind.
func (e *BelowError) Unwrap() []error { return []error{e.Err, errdefs.ErrUnavailable} }

// resolve resolves a query from the chain: from the seals of its layers, and from the
// tree of a layer that was never sealed. When a seal is lost, its layer is reported
// to Chain.Suspect. An error about a layer below is a BelowError.
func (b below) resolve(ctx context.Context, q query) error {
	chain := b.known
	for try := 1; ; try++ {
		if try > 1 || chain == nil {
			var err error
			if chain, err = b.chain.Parents(ctx); err != nil {
				return err
			}
		}
		q.Forget()
		p, err := queryChain(ctx, chain, q)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case !errors.Is(err, mtree.ErrUnsealed):
			return &BelowError{fmt.Errorf("layer snapshots/%d below it cannot be read: %w", p.ID, err)}
		case try < 3 && b.chain.Exchanged(ctx, p):
			continue
		}
		return b.chain.Suspect(ctx, p, err)
	}
}

// queryChain adds the layers of a chain to a query until it is decided, and returns
// the layer that the error is about.
func queryChain(ctx context.Context, chain []Parent, q query) (p Parent, err error) {
	for _, p = range chain {
		if !q.Open() {
			break
		}
		if err := ctx.Err(); err != nil {
			return p, err
		}
		if p.Digest == "" {
			err = q.BelowTree(p.Tree)
		} else {
			err = q.Below(p.Tree, p.seal(), p.Digest)
		}
		if err != nil {
			return p, err
		}
	}
	return p, nil
}

// lost returns the error of a query that the chain could not resolve. When a layer
// below has lost what its seal attests, that layer is reported to Chain.Suspect.
func (b below) lost(ctx context.Context, err error) error {
	lost := (*seal.LostError)(nil)
	if !errors.As(err, &lost) {
		return &BelowError{err}
	}
	chain, cerr := b.chain.Parents(ctx)
	for _, p := range chain {
		if p.Tree == lost.Tree {
			return b.chain.Suspect(ctx, p, err)
		}
	}
	return &BelowError{errors.Join(err, cerr)}
}

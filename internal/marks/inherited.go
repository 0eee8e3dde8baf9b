package marks

import (
	"context"

	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
)

// Sealed is a committed layer, by its seal.
type Sealed struct {
	File   string // of its seal
	Digest string // of its seal
	Space  overlayutil.Space
	Chain  Chain
	// Tar reads which directories have entries in the layer's tar. It is called once,
	// when something differs.
	Tar func(ctx context.Context) (*TarDirs, error)
}

// CompareInherited compares what a layer has taken from the layers below, by its
// seal, with what their seals show, and returns limit findings at most: attributes
// of directories that have no entry in its tar, and, where its root is opaque, the
// names that it hides. An error means that nothing is known.
func CompareInherited(ctx context.Context, l Sealed, limit int) ([]finding.Finding, error) {
	c := inheritedComparison{Sealed: l, below: below{chain: l.Chain}, limit: limit}
	return c.run(ctx)
}

type inheritedComparison struct {
	Sealed
	below below
	limit int
	tar   *TarDirs // nil before something differs
}

func (c *inheritedComparison) run(ctx context.Context) ([]finding.Finding, error) {
	dirs, err := seal.SealedDirs(c.File, c.Digest, c.Space)
	if err != nil {
		return nil, err
	}
	if dirs.RootOpaque() {
		return c.hidden(ctx)
	}
	if err := c.below.resolve(ctx, dirs); err != nil {
		return nil, err
	}
	return dirs.Compare(c.File, c.Digest, c.limit, func(rel string) (bool, error) {
		err := c.readTar(ctx)
		return err == nil && !c.tar.Has(rel), err
	})
}

// hidden compares the names in an opaque root with those that it must hide: see
// Normalizer.normalizeRoot.
func (c *inheritedComparison) hidden(ctx context.Context) (found []finding.Finding, err error) {
	own, err := seal.SealedTop(c.File, c.Digest, c.Space)
	if err != nil {
		return nil, err
	}
	top := seal.NewTop(c.Space)
	if err := c.below.resolve(ctx, top); err != nil {
		return nil, err
	}
	for _, name := range top.Names() {
		switch closed, has := own[name]; {
		case !has:
			found = append(found, finding.Finding{Path: name, What: "missing", Want: "whiteout", Below: true})
		case !closed:
			found = append(found, finding.Finding{Path: name, What: "xattr." + string(c.Space) + "opaque", Want: `"y"`, Below: true})
		}
	}
	if len(found) > 0 {
		err = c.readTar(ctx)
	}
	return found[:min(len(found), c.limit)], err
}

// readTar reads which directories have entries, once.
func (c *inheritedComparison) readTar(ctx context.Context) (err error) {
	if c.tar != nil {
		return nil
	}
	c.tar, err = c.Tar(ctx)
	return err
}

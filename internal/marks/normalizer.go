package marks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
)

// Normalizer makes a layer mean on disk what its tar meant. The walk of a Commit, or
// of a heal, passes it every entry before it counts it.
//
// It changes the layer's directory while no other process may write to it. After an
// error the meaning of the layer is unknown, and it can never be committed. A tree
// that it has changed no longer is what the applier left: see Unrepeatable.
type Normalizer struct {
	space    overlayutil.Space // that of our mounts
	features overlayutil.Features
	direct   bool       // an applier wrote into the directory, not through a mount
	rebased  bool       // the parent became known at Commit
	again    bool       // marks are in the space of our mounts already
	tree     string     // the layer's directory
	lower    []Parent   // the parent chain, topmost first
	below    below      // reads the seals of the chain
	dirs     *seal.Dirs // what they have answered, nil before the first query

	closed map[string]bool // directories that an opaque root makes opaque
	hidden string          // a directory below which the parent chain is hidden, "" when there is none

	origin  Origin      // which directories have an entry in the tar
	changed atomic.Bool // something in the tree was changed, or may have been

	mu    sync.Mutex // guards found: entries that are no directories come side by side
	found layout.OverlayMarks
}

// Options of a Normalizer.
type Options struct {
	Space    overlayutil.Space // that of our mounts
	Features overlayutil.Features
	Direct   bool // an applier wrote into the directory, not through a mount
	Rebased  bool // the parent became known at Commit
	// Again means that a Normalizer has been through the tree: the marks that it has
	// moved are not taken for some that come from the tar.
	Again  bool
	Tree   string   // the layer's directory
	Lower  []Parent // the parent chain, topmost first
	Chain  Chain    // the same chain, read again when a layer was healed
	Origin Origin   // which directories have an entry in the tar
}

// New returns a Normalizer for the layer in the directory Options.Tree, on the chain
// Options.Lower.
func New(o Options) *Normalizer {
	return &Normalizer{
		space: o.Space, features: o.Features, direct: o.Direct, rebased: o.Rebased, again: o.Again,
		tree: o.Tree, lower: o.Lower, below: below{o.Chain, o.Lower}, origin: o.Origin,
		found: layout.OverlayMarks{Space: string(o.Space)},
	}
}

// Found returns the marks that were found so far, and what was changed.
func (n *Normalizer) Found() layout.OverlayMarks {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.found
}

// Unrepeatable reports that a second pass would misread the tree: an applier wrote
// it, and this one has changed it, or may have.
func (n *Normalizer) Unrepeatable() bool { return n.direct && n.changed.Load() }

// stack is the parent chain on disk.
func (n *Normalizer) stack() overlayutil.Stack {
	return overlayutil.Stack{Space: n.space, Layers: Trees(n.lower)}
}

// Normalize is a seal.Change: it normalizes one entry of the layer, and reports whether
// the entry has changed. The error is an [Error] when the layer cannot be
// committed, and a [BelowError] when a layer below cannot be read.
func (n *Normalizer) Normalize(ctx context.Context, path string, e *seal.Entry) (changed bool, err error) {
	changed, err = n.normalize(ctx, path, e)
	if unknown := (*BelowError)(nil); errors.As(err, &unknown) {
		return false, err // nothing about this layer
	}
	if err != nil {
		return false, &Error{err}
	}
	return changed, nil
}

// Error means that the meaning of the layer is wrong or unknown.
type Error struct{ error }

// Unwrap returns the error itself.
func (e *Error) Unwrap() error { return e.error }

func (n *Normalizer) normalize(ctx context.Context, path string, e *seal.Entry) (changed bool, err error) {
	if e.Type() == unix.S_IFREG && len(e.Xattrs) == 0 {
		return false, nil // as nearly all are
	}
	m, err := n.normalizeMarks(ctx, path, e)
	if err != nil {
		return false, err
	}
	if e.Type() != unix.S_IFDIR {
		whiteout, err := n.space.IsWhiteout(path, &e.Stat)
		if whiteout {
			n.count(&n.found.Whiteouts)
		}
		return m.changed, err
	}
	if e.Path == "." {
		return true, n.normalizeRoot(ctx, path, m.opaque)
	}
	inherited, err := n.inherit(ctx, path, e)
	if err != nil {
		return false, err
	}
	if n.closed[e.Path] && !m.opaque {
		n.changed.Store(true)
		if err := n.space.Set(path, overlayutil.AttrOpaque, overlayutil.Opaque); err != nil {
			return false, err
		}
		m.opaque, m.changed = true, true
	}
	if m.opaque {
		n.count(&n.found.Opaque)
		if err := n.checkCopiedUp(path, e.Path); err != nil {
			return false, err
		}
		if !n.isHidden(e.Path) {
			n.hidden = e.Path
		}
	}
	return m.changed || inherited, nil
}

func (n *Normalizer) count(counter *int64) {
	n.mu.Lock()
	*counter++
	n.mu.Unlock()
}

type entryMarks struct {
	opaque  bool
	changed bool
}

// normalizeMarks normalizes the overlay attributes of one entry.
func (n *Normalizer) normalizeMarks(ctx context.Context, path string, e *seal.Entry) (m entryMarks, err error) {
	dir, direct := e.Type() == unix.S_IFDIR, n.direct && !n.again
	opaque := map[overlayutil.Space]string{}
	remove := func(space overlayutil.Space, name, why string) {
		if err == nil {
			log.G(ctx).WithField("path", path).Warnf("removed %s%s: %s", space, name, why)
			n.changed.Store(true)
			err = space.Remove(path, name)
			n.count(&n.found.Removed)
			m.changed = true
		}
	}
	for _, x := range e.Xattrs {
		space, name, ok := overlayutil.Split(x.Name)
		switch {
		case !ok:
		case direct && space == n.space && space == overlayutil.User:
			// The applier writes trusted marks only, so this one comes from the tar.
			remove(space, name, "a layer's tar cannot speak to overlayfs")
		case name == overlayutil.AttrOpaque && dir:
			opaque[space] = x.Value
		case space == n.space && name == overlayutil.AttrOpaque:
			remove(space, name, "not a directory")
		case space == n.space && (name == overlayutil.AttrRedirect || name == overlayutil.AttrMetacopy):
			return m, fmt.Errorf("%s has %s: part of it is in other layers, so this one is not whole by itself: %w", path, x.Name, errdefs.ErrFailedPrecondition)
		}
	}
	if err != nil {
		return m, err
	}

	ours, other := opaque[n.space], opaque[n.space.Other()]
	if other != "" && direct && n.space == overlayutil.User {
		// The applier always writes trusted marks, which our mounts do not read.
		if other != overlayutil.Opaque {
			return m, n.undefined(path, n.space.Other(), other)
		}
		n.changed.Store(true)
		if err := n.space.Set(path, overlayutil.AttrOpaque, other); err != nil {
			return m, err
		}
		n.count(&n.found.Moved)
		ours, m.changed = other, true
		if err := n.space.Other().Remove(path, overlayutil.AttrOpaque); err != nil {
			return m, err
		}
	} else if other != "" && (direct || ours != "") {
		// Shown by our mounts as an ordinary attribute, it would be copied up
		// with the directory, and hide things from a mount of the other kind.
		remove(n.space.Other(), overlayutil.AttrOpaque, "our mounts ignore it, and would copy it up")
	}
	switch {
	case ours == "" || ours == overlayutil.Opaque:
	case ours == overlayutil.XattrWhiteouts && n.features.XattrWhiteouts:
	default:
		return m, n.undefined(path, n.space, ours)
	}
	m.opaque = ours == overlayutil.Opaque
	return m, err
}

func (n *Normalizer) undefined(path string, space overlayutil.Space, value string) error {
	return fmt.Errorf("%s has %s%s=%q, which means nothing to this kernel: %w", path, space, overlayutil.AttrOpaque, value, errdefs.ErrFailedPrecondition)
}

// normalizeRoot expresses an opaque root by other marks. Kernels do not read the attributes
// of a layer's root (seen on 6.18): every name of the parent chain that the
// layer does not have gets a whiteout, every directory it has becomes opaque.
func (n *Normalizer) normalizeRoot(ctx context.Context, path string, opaque bool) error {
	if !n.direct || len(n.lower) == 0 {
		return nil
	}
	if err := n.ownRoot(ctx, path); err != nil || !opaque {
		return err
	}
	n.found.Root = true
	n.hidden = "."
	n.closed = map[string]bool{}
	names, err := n.top(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		own := filepath.Join(path, name)
		st, err := os.Lstat(own)
		switch {
		case errors.Is(err, os.ErrNotExist):
			n.changed.Store(true)
			err = overlayutil.MakeWhiteout(own)
		case err == nil && st.IsDir():
			n.closed[name] = true // when the walk gets there: times show what made it
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// top lists the names that the parent chain shows in its root, by its seals: what
// a parent has lost is hidden, too, for it comes back when the parent is healed.
func (n *Normalizer) top(ctx context.Context) ([]string, error) {
	top := seal.NewTop(n.space)
	err := n.below.resolve(ctx, top)
	return top.Names(), err
}

func (n *Normalizer) isHidden(rel string) bool {
	return n.hidden == "." || n.hidden != "" && strings.HasPrefix(rel, n.hidden+"/")
}

// checkCopiedUp refuses an opaque directory of which it cannot be known whether it
// was made opaque or copied up, on a kernel with that bug. What was copied up
// is equal to the directory below it, and such a kernel leaves no other trace
// (overlay.origin came later, with Linux 4.12).
func (n *Normalizer) checkCopiedUp(path, rel string) error {
	if n.direct || !n.features.OpaqueCopiedUp {
		return nil
	}
	lower, err := n.stack().Lookup(rel)
	if err != nil || lower == "" {
		return err
	}
	mark, err := n.space.Get(lower, overlayutil.AttrOpaque)
	if err != nil || mark != overlayutil.Opaque {
		return err
	}
	return fmt.Errorf("%s is opaque, and so is %s below it: this kernel copies the mark up by mistake (fixed in Linux 4.8), "+
		"and files of lower layers would vanish; update the kernel: %w", path, lower, errdefs.ErrFailedPrecondition)
}

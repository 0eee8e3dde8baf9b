package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// truth makes a layer mean on disk what its tar said. Commit's walk shows it
// every entry before it counts it.
//
// What it changes, it changes in the layer's directory while nobody else has a
// right to; an error on the way leaves a layer of which nobody can say what it
// means, and Commit refuses it for ever.
type truth struct {
	space    overlayutil.Space // that of our mounts
	features overlayutil.Features
	direct   bool              // an applier wrote into the directory, not through a mount
	rebased  bool              // the parent became known at Commit
	lower    overlayutil.Stack // the parent chain

	closed map[string]bool // directories that an opaque root makes opaque
	hidden string          // a directory below which the parent chain is hidden, "" when there is none

	mu    sync.Mutex // guards found: entries that are no directories come side by side
	found overlayMarks
}

// overlayMarks is what a layer says to overlayfs, and what Commit had to do
// about it; part of the layer's record.
type overlayMarks struct {
	Space     string `json:"space"`               // prefix of the marks
	Opaque    int64  `json:"opaque,omitempty"`    // opaque directories
	Whiteouts int64  `json:"whiteouts,omitempty"` // entries that hide a name

	Root      bool  `json:"root,omitempty"`      // the tar made its root opaque; said with whiteouts
	Moved     int64 `json:"moved,omitempty"`     // opaque marks brought from the other space
	Removed   int64 `json:"removed,omitempty"`   // marks that said nothing, or were smuggled in
	Inherited int64 `json:"inherited,omitempty"` // directories that got the attributes of the parent's
}

// truthOf is for the layer of an active snapshot that is going to be committed
// on a parent, or on none.
func (s *Snapshotter) truthOf(ctx context.Context, a *active, info snapshots.Info, parent string) (*truth, error) {
	rebased := info.Parent != parent
	if rebased && a.extraction && !isRebase(info) {
		return nil, fmt.Errorf("parallel unpack by a client that does not announce the parent at Prepare: its applier lost the whiteouts; "+
			"use containerd 2.3 or newer, or take \"rebase\" out of the capabilities of the proxy plugin: %w", errdefs.ErrFailedPrecondition)
	}
	if a.shapedBy != "" && a.shapedBy != parent {
		return nil, fmt.Errorf("an earlier commit fitted the layer to parent %q; extract again: %w", a.shapedBy, errdefs.ErrFailedPrecondition)
	}
	lower, err := s.lowerOf(ctx, parent)
	if err != nil {
		return nil, err
	}
	if rebased {
		// What a directory inherits must not come from a damaged one.
		if err := s.known(parent); err != nil {
			return nil, fmt.Errorf("parent %q: %w", parent, err)
		}
	}
	if a.extraction {
		a.shapedBy = parent
	}
	// containerd's applier writes into the directory itself, unless mknod is
	// forbidden (core/diff/apply/apply_linux.go:34).
	return s.newTruth(lower, a.extraction && (!inUserNS() || len(lower) == 0), rebased), nil
}

func (s *Snapshotter) newTruth(lower []string, direct, rebased bool) *truth {
	return &truth{
		space: s.space, features: s.features, direct: direct, rebased: rebased,
		lower: overlayutil.Stack{Space: s.space, Layers: lower},
		found: overlayMarks{Space: string(s.space)},
	}
}

// lowerOf returns the directories of a parent chain, topmost first.
func (s *Snapshotter) lowerOf(ctx context.Context, parent string) (lower []string, err error) {
	err = s.db.View(ctx, func(ctx context.Context, _ *storage.Journal) error {
		for name := parent; name != ""; {
			id, info, _, err := storage.Info(ctx, name)
			if err != nil {
				return fmt.Errorf("parent %q: %w", name, err)
			}
			if info.Kind != snapshots.KindCommitted {
				return fmt.Errorf("parent %q is not committed: %w", name, errdefs.ErrFailedPrecondition)
			}
			lower = append(lower, filepath.Join(s.dir(id), "fs"))
			name = info.Parent
		}
		return nil
	})
	return lower, err
}

// entry is the seal.Hook of a Commit.
func (t *truth) entry(ctx context.Context, path string, e *seal.Entry) (changed bool, err error) {
	if changed, err = t.bringInOrder(ctx, path, e); err != nil {
		return false, &untrueError{err}
	}
	return changed, nil
}

// untrueError is an error of truth: what the layer means is wrong or unknown.
type untrueError struct{ error }

func (e *untrueError) Unwrap() error { return e.error }

func (t *truth) bringInOrder(ctx context.Context, path string, e *seal.Entry) (changed bool, err error) {
	m, err := t.marks(ctx, path, e)
	if err != nil {
		return false, err
	}
	if e.Type() != unix.S_IFDIR {
		whiteout, err := t.space.IsWhiteout(path, &e.Stat)
		if whiteout {
			t.count(&t.found.Whiteouts)
		}
		return m.changed, err
	}
	if e.Path == "." {
		return true, t.root(path, m.opaque)
	}
	inherited, err := t.inherit(path, e)
	if err != nil {
		return false, err
	}
	if t.closed[e.Path] && !m.opaque {
		if err := t.space.Set(path, overlayutil.AttrOpaque, overlayutil.Opaque); err != nil {
			return false, err
		}
		m.opaque, m.changed = true, true
	}
	if m.opaque {
		t.count(&t.found.Opaque)
		if err := t.checkCopiedUp(path, e.Path); err != nil {
			return false, err
		}
		if !t.isHidden(e.Path) {
			t.hidden = e.Path
		}
	}
	return m.changed || inherited, nil
}

func (t *truth) count(n *int64) {
	t.mu.Lock()
	*n++
	t.mu.Unlock()
}

type marks struct {
	opaque  bool
	changed bool
}

// marks brings the overlay attributes of one entry in order.
func (t *truth) marks(ctx context.Context, path string, e *seal.Entry) (m marks, err error) {
	dir := e.Type() == unix.S_IFDIR
	opaque := map[overlayutil.Space]string{}
	remove := func(space overlayutil.Space, name, why string) {
		if err == nil {
			log.G(ctx).WithField("path", path).Warnf("removed %s%s: %s", space, name, why)
			err = space.Remove(path, name)
			t.count(&t.found.Removed)
			m.changed = true
		}
	}
	for _, x := range e.Xattrs {
		space, name, ok := overlayutil.Split(x.Name)
		switch {
		case !ok:
		case t.direct && space == t.space && space == overlayutil.User:
			// The applier writes trusted marks only, so the tar brought this.
			remove(space, name, "a layer's tar cannot speak to overlayfs")
		case name == overlayutil.AttrOpaque && dir:
			opaque[space] = x.Value
		case space == t.space && name == overlayutil.AttrOpaque:
			remove(space, name, "not a directory")
		case space == t.space && (name == overlayutil.AttrRedirect || name == overlayutil.AttrMetacopy):
			return m, fmt.Errorf("%s has %s: part of it is in other layers, so this one is not whole by itself: %w", path, x.Name, errdefs.ErrFailedPrecondition)
		}
	}
	if err != nil {
		return m, err
	}

	ours, other := opaque[t.space], opaque[t.space.Other()]
	if other != "" && t.direct && t.space == overlayutil.User {
		// The applier always writes trusted marks; our mounts would not look.
		if other != overlayutil.Opaque {
			return m, t.undefined(path, t.space.Other(), other)
		}
		if err := t.space.Set(path, overlayutil.AttrOpaque, other); err != nil {
			return m, err
		}
		t.count(&t.found.Moved)
		ours, m.changed = other, true
		if err := t.space.Other().Remove(path, overlayutil.AttrOpaque); err != nil {
			return m, err
		}
	} else if other != "" && (t.direct || ours != "") {
		// Shown by our mounts as an ordinary attribute, it would be copied up
		// with the directory, and hide things from a mount of the other kind.
		remove(t.space.Other(), overlayutil.AttrOpaque, "our mounts do not look at it, and would copy it up")
	}
	switch {
	case ours == "" || ours == overlayutil.Opaque:
	case ours == overlayutil.XattrWhiteouts && t.features.XattrWhiteouts:
	default:
		return m, t.undefined(path, t.space, ours)
	}
	m.opaque = ours == overlayutil.Opaque
	return m, err
}

func (t *truth) undefined(path string, space overlayutil.Space, value string) error {
	return fmt.Errorf("%s has %s%s=%q, which means nothing to this kernel: %w", path, space, overlayutil.AttrOpaque, value, errdefs.ErrFailedPrecondition)
}

// root says what an opaque root means. Kernels do not look at the attributes
// of a layer's root (seen on 6.18): every name of the parent chain that the
// layer does not have gets a whiteout, every directory it has becomes opaque.
func (t *truth) root(path string, opaque bool) error {
	if !t.direct || len(t.lower.Layers) == 0 {
		return nil
	}
	if t.rebased {
		// At Prepare, with a parent, containerd gives the new root the
		// parent's owner.
		if err := sameOwner(path, t.lower.Layers[0]); err != nil {
			return err
		}
	}
	if !opaque {
		return nil
	}
	t.found.Root = true
	t.hidden = "."
	t.closed = map[string]bool{}
	names, err := t.lower.Top()
	if err != nil {
		return err
	}
	for _, name := range names {
		own := filepath.Join(path, name)
		st, err := os.Lstat(own)
		switch {
		case errors.Is(err, os.ErrNotExist):
			err = overlayutil.MakeWhiteout(own)
		case err == nil && st.IsDir():
			t.closed[name] = true // when the walk gets there: times tell who made it
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (t *truth) isHidden(rel string) bool {
	return t.hidden == "." || t.hidden != "" && strings.HasPrefix(rel, t.hidden+"/")
}

// checkCopiedUp refuses an opaque directory of which nobody can say whether it
// was made opaque or copied up, on a kernel with that bug. What was copied up
// looks like the directory below it, and such a kernel leaves no other trace
// (overlay.origin came later, with Linux 4.12).
func (t *truth) checkCopiedUp(path, rel string) error {
	if t.direct || !t.features.OpaqueCopiedUp {
		return nil
	}
	lower, err := t.lower.Lookup(rel)
	if err != nil || lower == "" {
		return err
	}
	mark, err := t.space.Get(lower, overlayutil.AttrOpaque)
	if err != nil || mark != overlayutil.Opaque {
		return err
	}
	return fmt.Errorf("%s is opaque, and so is %s below it: this kernel copies the mark up by mistake (fixed in Linux 4.8), "+
		"and files of lower layers would vanish; update the kernel: %w", path, lower, errdefs.ErrFailedPrecondition)
}

package marks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
)

// inherit gives a directory that the layer's tar did not contain the attributes
// that the parent chain shows for it. The applier had to invent it, because the
// tar has something in it, and could not know the chain: see Snapshotter.adapt.
// Where the chain shows no directory it stays as it was made, with what the kernel let it
// inherit from the directory around it (a default ACL, a setgid group).
func (n *Normalizer) inherit(ctx context.Context, path string, e *seal.Entry) (changed bool, err error) {
	if !n.direct || len(n.lower) == 0 || n.isHidden(e.Path) {
		return false, nil
	}
	evidence, err := n.origin.of(path, e)
	if err != nil || evidence == fromTar {
		return false, err
	}
	want, found, err := n.shown(ctx, e.Path)
	if err != nil || !found {
		return false, err
	}
	have := attributesOf(e)
	if have.equal(want) {
		return false, nil
	}
	// Only now: it may have to read the tar.
	if invented, err := n.origin.decide(ctx, e.Path, evidence); err != nil || !invented {
		return false, err
	}
	n.count(&n.found.Inherited)
	n.changed.Store(true)
	return true, have.become(want, path)
}

// attributes of a directory that a copy-up would copy.
type attributes struct {
	mode     uint32
	uid, gid uint32
	xattrs   []seal.Xattr
}

// shown returns the attributes of the directory that the parent chain shows;
// found is false when it shows none.
//
// The seals of the parents decide, not their trees: a parent may have lost the
// directory, or its owner, and not have been verified since. The first call
// reads the directories of the layer, and the seal of each parent once, until every
// directory that later calls may be about is decided. containerd waits meanwhile,
// so a layer without invented directories does not get here.
func (n *Normalizer) shown(ctx context.Context, rel string) (_ attributes, found bool, err error) {
	if n.dirs == nil || !n.dirs.Wanted(rel) {
		if err := n.readDirs(ctx, rel, n.dirs != nil); err != nil {
			return attributes{}, false, err
		}
	}
	e, found, err := n.dirs.Shown(rel)
	if err != nil {
		return attributes{}, false, n.below.lost(ctx, err)
	}
	if !found {
		return attributes{}, false, nil
	}
	return attributesOf(&e), true, nil
}

// readDirs reads what the parent chain shows for the directory rel and for those
// that come after it in the walk, and may have been invented; with all, for every
// one.
func (n *Normalizer) readDirs(ctx context.Context, rel string, all bool) error {
	dirs, err := seal.ListDirs(ctx, n.tree, n.space, func(e *seal.Entry) bool {
		// The mode and owner of the others prove that they have an entry: see
		// origin.of.
		return all || e.Path == rel || e.Stat.Mode&^unix.S_IFMT == 0o755 && e.Stat.Uid == 0
	})
	if err != nil {
		return err
	}
	n.dirs = dirs
	return n.below.resolve(ctx, dirs)
}

func attributesOf(e *seal.Entry) attributes {
	xattrs := slices.DeleteFunc(slices.Clone(e.Xattrs), func(x seal.Xattr) bool { return !seal.Inheritable(x.Name) })
	return attributes{e.Stat.Mode &^ unix.S_IFMT, e.Stat.Uid, e.Stat.Gid, xattrs}
}

func (a attributes) equal(b attributes) bool {
	return a.mode == b.mode && a.uid == b.uid && a.gid == b.gid && slices.Equal(a.xattrs, b.xattrs)
}

func (a attributes) become(want attributes, path string) error {
	for _, x := range a.xattrs {
		if err := sysx.LRemovexattr(path, x.Name); err != nil {
			return &os.PathError{Op: "removexattr " + x.Name, Path: path, Err: err}
		}
	}
	for _, x := range want.xattrs {
		if err := sysx.LSetxattr(path, x.Name, []byte(x.Value), 0); err != nil {
			return &os.PathError{Op: "setxattr " + x.Name, Path: path, Err: err}
		}
	}
	// After chown, which may clear bits of the mode, and after the xattrs, of
	// which an access control list is a part of the mode.
	if err := unix.Lchown(path, int(want.uid), int(want.gid)); err != nil {
		return &os.PathError{Op: "lchown", Path: path, Err: err}
	}
	if err := unix.Chmod(path, want.mode); err != nil {
		return &os.PathError{Op: "chmod", Path: path, Err: err}
	}
	return nil
}

// ownRoot gives the root of a layer the owner of its parent's root. Containerd does
// that at Prepare when it knows the parent, with the owner that the parent's root
// has on disk (plugins/snapshots/overlay); a label may make it another one. Nearly
// every root belongs to root, so the seals are read only where one does not.
func (n *Normalizer) ownRoot(ctx context.Context, path string) error {
	var have, parent unix.Stat_t
	if err := errors.Join(unix.Lstat(path, &have), unix.Lstat(n.lower[0].Tree, &parent)); err != nil {
		return fmt.Errorf("owner of %s for %s: %w", n.lower[0].Tree, path, err)
	}
	same := have.Uid == parent.Uid && have.Gid == parent.Gid
	if same && have.Uid == 0 && have.Gid == 0 || !same && !n.rebased {
		return nil
	}
	want := attributes{uid: parent.Uid, gid: parent.Gid}
	if n.lower[0].Digest != "" {
		shown, found, err := n.shown(ctx, ".")
		if err != nil {
			return err
		}
		if found {
			want = shown
		}
	}
	if have.Uid == want.uid && have.Gid == want.gid {
		return nil
	}
	n.changed.Store(true)
	if err := unix.Lchown(path, int(want.uid), int(want.gid)); err != nil {
		return &os.PathError{Op: "lchown", Path: path, Err: err}
	}
	return nil
}

// SameOwner gives path the owner of another file.
func SameOwner(path, as string) error {
	var st unix.Stat_t
	if err := unix.Lstat(as, &st); err != nil {
		return fmt.Errorf("owner of %s for %s: %w", as, path, err)
	}
	if err := unix.Lchown(path, int(st.Uid), int(st.Gid)); err != nil {
		return &os.PathError{Op: "lchown", Path: path, Err: err}
	}
	return nil
}

// ParentNeeded reports whether a tree cannot be sealed before its parent is known: its
// root is opaque or has an owner of its own, or a directory has no entry in the tar and may inherit from the parent.
func ParentNeeded(ctx context.Context, root string, dirs *TarDirs) (needed bool, err error) {
	mark, err := overlayutil.Trusted.Get(root, overlayutil.AttrOpaque)
	if err != nil || mark != "" {
		return mark != "", err
	}
	t, err := tree.Open(root)
	if err != nil {
		return false, err
	}
	defer t.Close()
	err = t.Walk(ctx, func(rel string) (bool, error) {
		st, err := t.Lstat(rel)
		if err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return false, err
		}
		// A root of another owner gets that of the parent's: see Normalizer.
		needed = needed || rel == "." && (st.Uid != 0 || st.Gid != 0) || rel != "." && !dirs.Has(rel)
		return !needed, nil
	}, func(string) error { return nil })
	return needed, err
}

package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
)

// inherit gives a directory that the layer's tar did not contain the attributes
// that the parent chain shows for it. The applier had to invent it, because the
// tar has something in it; with the parents at hand it copies attributes itself
// (pkg/archive/tar.go:448), but not always those that the chain shows: see adapt.
func (t *truth) inherit(path string, e *seal.Entry) (changed bool, err error) {
	if !t.direct || len(t.lower.Layers) == 0 {
		return false, nil
	}
	if invented, err := isInvented(path, e); err != nil || !invented {
		return false, err
	}
	want := inventedAs
	if !t.isHidden(e.Path) {
		if want, err = t.shown(e.Path); err != nil {
			return false, err
		}
	}
	have := attributesOf(e)
	if have.equal(want) {
		return false, nil
	}
	t.count(&t.found.Inherited)
	return true, have.become(want, path)
}

// isInvented reports whether the tar that was applied has no entry for a
// directory. Of one that has, the applier sets both times, as its last act. The
// others have the time of access of their birth, if nobody has read them since,
// and the time of modification of the last change in them, which the kernel
// sets together with that of status changes; a mark that came later moves
// only the latter.
func isInvented(path string, e *seal.Entry) (bool, error) {
	if e.Stat.Mtim == e.Stat.Ctim {
		return true, nil
	}
	var x unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BTIME, &x); err != nil {
		return false, &os.PathError{Op: "statx", Path: path, Err: err}
	}
	return x.Mask&unix.STATX_BTIME != 0 && e.Stat.Atim == unix.Timespec{Sec: x.Btime.Sec, Nsec: int64(x.Btime.Nsec)}, nil
}

// attributes of a directory that copying up would bring along.
type attributes struct {
	mode     uint32
	uid, gid uint32
	xattrs   []seal.Xattr
}

// inventedAs is what the applier makes when it knows no better.
var inventedAs = attributes{mode: 0o755}

// shown returns the attributes of the directory that the parent chain shows, or
// those of a new one.
func (t *truth) shown(rel string) (attributes, error) {
	path, err := t.lower.Lookup(rel)
	if err != nil || path == "" {
		return inventedAs, err
	}
	e, err := seal.Read(path, rel)
	if err != nil || e.Type() != unix.S_IFDIR {
		return inventedAs, err
	}
	return attributesOf(&e), nil
}

func attributesOf(e *seal.Entry) attributes {
	return attributes{e.Stat.Mode &^ unix.S_IFMT, e.Stat.Uid, e.Stat.Gid, inheritable(e.Xattrs)}
}

// inheritable leaves out what says something about the layer (overlay's marks)
// or about the machine (security modules label files themselves).
func inheritable(attrs []seal.Xattr) []seal.Xattr {
	return slices.DeleteFunc(slices.Clone(attrs), func(x seal.Xattr) bool {
		_, _, overlay := overlayutil.Split(x.Name)
		return overlay || strings.HasPrefix(x.Name, "security.")
	})
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

func sameOwner(path, as string) error {
	var have, want unix.Stat_t
	if err := errors.Join(unix.Lstat(path, &have), unix.Lstat(as, &want)); err != nil {
		return fmt.Errorf("owner of %s for %s: %w", as, path, err)
	}
	if have.Uid == want.Uid && have.Gid == want.Gid {
		return nil
	}
	if err := unix.Lchown(path, int(want.Uid), int(want.Gid)); err != nil {
		return &os.PathError{Op: "lchown", Path: path, Err: err}
	}
	return nil
}

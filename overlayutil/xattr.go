package overlayutil

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"
)

// Space is the prefix of overlay's attributes.
type Space string

// The spaces: that of a usual mount, and that of one with userxattr.
const (
	Trusted Space = "trusted.overlay."
	User    Space = "user.overlay."
)

// SpaceOf returns the space that a mount with these options uses.
func SpaceOf(options []string) Space {
	for _, o := range options {
		if o == "userxattr" {
			return User
		}
	}
	return Trusted
}

// Other returns the space whose attributes mounts of this space ignore.
func (s Space) Other() Space {
	if s == Trusted {
		return User
	}
	return Trusted
}

// Names of attributes, without their space; see the package documentation.
const (
	AttrOpaque   = "opaque"
	AttrRedirect = "redirect"
	AttrMetacopy = "metacopy"
	AttrWhiteout = "whiteout"
	AttrOrigin   = "origin"
	AttrImpure   = "impure"
	AttrNlink    = "nlink"
	AttrUpper    = "upper"
	AttrUUID     = "uuid"
	AttrProtattr = "protattr"
)

// Values of AttrOpaque.
const (
	Opaque         = "y" // what lower layers have in this directory is hidden
	XattrWhiteouts = "x" // files with AttrWhiteout in it are whiteouts
)

// Split takes the name of an extended attribute apart; ok is false for one that
// is not overlay's. An escaped attribute of a nested overlay
// ("trusted.overlay.overlay.opaque", since Linux 6.7) has the name
// "overlay.opaque".
func Split(xattr string) (space Space, name string, ok bool) {
	for _, s := range []Space{Trusted, User} {
		if name, ok := strings.CutPrefix(xattr, string(s)); ok {
			return s, name, true
		}
	}
	return "", "", false
}

// Bookkeeping reports whether the kernel sets and changes an attribute by
// itself on layers that are in use. Such an attribute does not change what a layer means.
func Bookkeeping(name string) bool {
	switch name {
	case AttrOrigin, AttrImpure, AttrNlink, AttrUpper, AttrUUID:
		return true
	}
	return false
}

// Get reads an attribute, of a symbolic link itself. It is "" when there is
// none, also on a file system without extended attributes.
func (s Space) Get(path, name string) (string, error) {
	value, _, err := s.lookup(path, name)
	return value, err
}

func (s Space) lookup(path, name string) (value string, set bool, err error) {
	b, err := sysx.LGetxattr(path, string(s)+name)
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
		return "", false, nil
	}
	if err != nil {
		return "", false, &os.PathError{Op: "getxattr " + string(s) + name, Path: path, Err: err}
	}
	return string(b), true, nil
}

// Set writes an attribute.
func (s Space) Set(path, name, value string) error {
	if err := sysx.LSetxattr(path, string(s)+name, []byte(value), 0); err != nil {
		return &os.PathError{Op: "setxattr " + string(s) + name, Path: path, Err: err}
	}
	return nil
}

// Remove removes an attribute. It is no error when there is none.
func (s Space) Remove(path, name string) error {
	if err := sysx.LRemovexattr(path, string(s)+name); err != nil && !errors.Is(err, unix.ENODATA) {
		return &os.PathError{Op: "removexattr " + string(s) + name, Path: path, Err: err}
	}
	return nil
}

// IsWhiteout reports whether an entry of a layer, with this result of lstat(2),
// hides what lower layers have under its name.
func (s Space) IsWhiteout(path string, st *unix.Stat_t) (bool, error) {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		return st.Rdev == 0, nil
	case unix.S_IFREG:
		if st.Size != 0 {
			return false, nil
		}
		if _, set, err := s.lookup(path, AttrWhiteout); err != nil || !set {
			return false, err
		}
		opaque, err := s.Get(filepath.Dir(path), AttrOpaque)
		return opaque == XattrWhiteouts, err
	}
	return false, nil
}

// MakeWhiteout makes the usual whiteout.
func MakeWhiteout(path string) error {
	if err := unix.Mknod(path, unix.S_IFCHR, 0); err != nil {
		return &os.PathError{Op: "mknod", Path: path, Err: err}
	}
	return nil
}

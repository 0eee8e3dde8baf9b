package extract

import (
	"archive/tar"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Names with a meaning (OCI image-spec, layer.md, "Whiteouts").
const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

// whiteout does what an entry means whose name begins with the prefix, whatever its type
// is.
func (x *extraction) whiteout(d *dir, base string, h *tar.Header) error {
	name := base[len(whiteoutPrefix):]
	if base != opaqueName && (name == "" || name == "." || name == "..") {
		return fmt.Errorf("invalid whiteout name %q: %w", h.Name, ErrInvalid)
	}
	var err error
	switch {
	case x.Whiteouts == Mark && base == opaqueName:
		err = x.markOpaque(d)
	case x.Whiteouts == Mark:
		err = x.markRemoved(d, name, h)
	case base == opaqueName:
		err = x.empty(d)
	default:
		err = x.tree.remove(d, name)
	}
	if err != nil {
		return failed("apply the whiteout", h.Name, err)
	}
	return nil
}

func (x *extraction) markOpaque(d *dir) error {
	at, err := x.tree.fd(d)
	if err != nil {
		return err
	}
	x.result.Opaque++
	// fsetxattr(2) takes no descriptor opened with O_PATH.
	return unix.Setxattr("/proc/self/fd/"+strconv.Itoa(at), "trusted.overlay.opaque", []byte{'y'}, 0)
}

// markRemoved makes a whiteout. An entry of the same name before it is an error, as in
// containerd: the other order replaces the whiteout.
func (x *extraction) markRemoved(d *dir, name string, h *tar.Header) error {
	at, err := x.tree.fd(d)
	if err != nil {
		return err
	}
	if err := unix.Mknodat(at, name, unix.S_IFCHR, 0); err != nil {
		return err
	}
	x.result.Whiteouts++
	return unix.Fchownat(at, name, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW)
}

// empty removes what is in a directory and came from no entry of this tar; also
// directories that were invented for entries inside them, as containerd does. A second time it
// does nothing.
func (x *extraction) empty(d *dir) error {
	if x.emptied == nil {
		x.emptied = newPaths()
	}
	if !x.emptied.add(d.rel()) {
		return nil
	}
	top := filepath.Join(x.tree.path, d.rel())
	return filepath.WalkDir(top, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // what was around it was removed
		}
		if err != nil || path == top {
			return err
		}
		rel, err := filepath.Rel(x.tree.path, path)
		if err != nil || x.unpacked.has(rel) {
			return err
		}
		if around := x.tree.lookup(filepath.Dir(rel)); around != nil {
			err = x.tree.remove(around, filepath.Base(rel))
		} else {
			err = os.RemoveAll(path)
		}
		if err == nil && entry.IsDir() {
			err = fs.SkipDir
		}
		return err
	})
}

// paths is a set of paths. It keeps hashes of them: a hostile tar may have millions of long
// ones.
type paths struct {
	seed maphash.Seed
	set  map[uint64]struct{}
}

func newPaths() *paths { return &paths{seed: maphash.MakeSeed(), set: map[uint64]struct{}{}} }

// add reports whether the path was not in the set.
func (p *paths) add(path string) bool {
	before := len(p.set)
	p.set[maphash.String(p.seed, path)] = struct{}{}
	return len(p.set) > before
}

func (p *paths) has(path string) bool {
	_, ok := p.set[maphash.String(p.seed, path)]
	return ok
}

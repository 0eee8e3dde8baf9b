package seal

import (
	"os"

	"golang.org/x/sys/unix"
)

// Entry is a file, a directory or anything else that has a name.
type Entry struct {
	Path   string // relative to the root of the tree, "." for the root
	Stat   unix.Stat_t
	Link   string // target of a symbolic link
	Xattrs []Xattr
}

// Read reads all of an entry but its content, with every extended attribute. rel
// is its path in the tree.
func Read(path, rel string) (Entry, error) {
	e := Entry{Path: rel}
	if err := unix.Lstat(path, &e.Stat); err != nil {
		return e, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	var err error
	if e.Type() == unix.S_IFLNK {
		if e.Link, err = os.Readlink(path); err != nil {
			return e, err
		}
	}
	e.Xattrs, err = attributes{all: true, limit: maxRead}.read(path)
	return e, err
}

// Type is the type bits of the mode.
func (e *Entry) Type() uint32 { return e.Stat.Mode & unix.S_IFMT }

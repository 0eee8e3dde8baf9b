package seal

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
)

// Entry is a file, a directory or anything else that has a name.
type Entry struct {
	Path   string // relative to the root of the tree, "." for the root
	Stat   unix.Stat_t
	Link   string // target of a symbolic link
	Xattrs []Xattr
}

// Xattr is an extended attribute.
type Xattr struct{ Name, Value string }

// Read reads all of an entry but its content. rel is its path in the tree.
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
	e.Xattrs, err = readXattrs(path)
	return e, err
}

// readXattrs reads all extended attributes, sorted by name.
func readXattrs(path string) ([]Xattr, error) {
	names, err := sysx.LListxattr(path)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "listxattr", Path: path, Err: err}
	}
	if len(names) == 0 {
		return nil, nil
	}
	slices.Sort(names)
	attrs := make([]Xattr, len(names))
	for i, name := range names {
		value, err := sysx.LGetxattr(path, name)
		if err != nil {
			return nil, &os.PathError{Op: "getxattr " + name, Path: path, Err: err}
		}
		attrs[i] = Xattr{name, string(value)}
	}
	return attrs, nil
}

// Type is the type bits of the mode.
func (e *Entry) Type() uint32 { return e.Stat.Mode & unix.S_IFMT }

var typeNames = map[uint32]string{
	unix.S_IFREG: "file", unix.S_IFDIR: "dir", unix.S_IFLNK: "link", unix.S_IFCHR: "char",
	unix.S_IFBLK: "block", unix.S_IFIFO: "fifo", unix.S_IFSOCK: "socket",
}

// appendLine appends the entry's line of a seal, with its line break.
func (e *Entry) appendLine(b []byte) []byte {
	if e.Path == "." {
		b = append(b, '.')
	} else {
		b = appendVis(append(b, "./"...), e.Path)
	}
	st := &e.Stat
	b = append(append(b, " type="...), typeNames[e.Type()]...)
	b = strconv.AppendUint(append(b, " mode=0"...), uint64(st.Mode&^unix.S_IFMT), 8)
	b = strconv.AppendUint(append(b, " uid="...), uint64(st.Uid), 10)
	b = strconv.AppendUint(append(b, " gid="...), uint64(st.Gid), 10)
	switch e.Type() {
	case unix.S_IFREG:
		b = strconv.AppendUint(append(b, " nlink="...), uint64(st.Nlink), 10)
		b = strconv.AppendInt(append(b, " size="...), st.Size, 10)
	case unix.S_IFLNK:
		b = appendVis(append(b, " link="...), e.Link)
	case unix.S_IFCHR, unix.S_IFBLK:
		// No link count: overlay links whiteouts together.
		b = fmt.Appendf(b, " device=native,%d,%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	b = strconv.AppendInt(append(b, " time="...), st.Mtim.Sec, 10)
	b = append(b, '.')
	nsec := strconv.FormatInt(st.Mtim.Nsec, 10)
	b = append(append(b, "000000000"[len(nsec):]...), nsec...)
	for _, x := range e.Xattrs {
		if _, name, ok := overlayutil.Split(x.Name); ok && overlayutil.Bookkeeping(name) {
			continue
		}
		b = append(appendVis(append(b, " xattr."...), x.Name), '=')
		b = base64.StdEncoding.AppendEncode(b, []byte(x.Value))
	}
	return append(b, '\n')
}

// appendVis appends a name with every byte that mtree might take for something
// else as \ooo (vis(3) with VIS_OCTAL).
func appendVis(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || strings.IndexByte(`\#=*?[`, c) >= 0 {
			b = append(b, '\\', '0'+c>>6, '0'+c>>3&7, '0'+c&7)
		} else {
			b = append(b, c)
		}
	}
	return b
}

// unvis is the inverse of appendVis.
func unvis(s string) (string, error) {
	if strings.IndexByte(s, '\\') < 0 {
		return s, nil
	}
	var b []byte
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' {
			b = append(b, s[i])
			continue
		}
		if i+4 > len(s) {
			return "", fmt.Errorf("name %q: cut short", s)
		}
		c, err := strconv.ParseUint(s[i+1:i+4], 8, 8)
		if err != nil {
			return "", fmt.Errorf("name %q: %w", s, err)
		}
		b = append(b, byte(c))
		i += 3
	}
	return string(b), nil
}

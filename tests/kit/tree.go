package kit

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Tree is the fingerprint of everything below a directory: one text per entry,
// by path relative to the top, which is ".".
type Tree map[string]Inode

// Inode is what is known of one entry.
type Inode struct {
	Mode   fs.FileMode
	Uid    uint32
	Gid    uint32
	Rdev   uint64    // of devices
	Nlink  uint64    // of all but directories, where file systems count differently
	Size   int64     // of regular files
	Sum    string    // SHA-256 of a regular file's content, in hex
	Target string    // of symbolic links
	Mtime  time.Time // zero after Untime
	Xattrs string    // sorted name=value pairs, quoted

	// Phantom is an entry that its directory lists and a lookup does not find:
	// overlayfs shows a whiteout so in a directory that no lower layer has.
	Phantom bool
}

// bookkeeping are the attributes overlayfs keeps for itself. They name inodes
// and file handles, so they differ between two equal layers. The opaque mark is
// not among them: it is content.
var bookkeeping = []string{
	"trusted.overlay.origin", "trusted.overlay.impure", "trusted.overlay.nlink",
	"trusted.overlay.uuid", "trusted.overlay.upper",
}

// Fingerprint reads every entry and every byte below dir. The entries whose
// paths (relative to dir) are in skip are left out with all below them.
func Fingerprint(dir string, skip ...string) (Tree, error) {
	r := inodeReaders.Get().(*inodeReader)
	defer inodeReaders.Put(r)
	w := &fingerprinting{inodeReader: r, top: dir, skip: skip, tree: Tree{}}
	if err := w.directory(unix.AT_FDCWD, dir, "."); err != nil {
		return nil, fmt.Errorf("fingerprint %s: %w", dir, err)
	}
	return w.tree, nil
}

// fingerprinting is one in progress. It opens each name in its directory, without a path that
// the kernel walks from the root and without an os.File, whose poller takes five system
// calls more for each: tests read millions of files.
type fingerprinting struct {
	*inodeReader
	top  string
	skip []string
	tree Tree
}

// directory reads name in the directory at, and all below it. rel is its path below the top.
func (w *fingerprinting) directory(at int, name, rel string) error {
	if slices.Contains(w.skip, rel) {
		return nil
	}
	fd, err := openAt(at, name, unix.O_DIRECTORY)
	if err != nil {
		return &fs.PathError{Op: "open", Path: filepath.Join(w.top, rel), Err: err}
	}
	defer unix.Close(fd)
	if w.tree[rel], err = w.inode(fd, filepath.Join(w.top, rel)); err != nil {
		return err
	}
	entries, err := w.entries(fd, rel)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := e.name
		if rel != "." {
			path = rel + "/" + e.name
		}
		switch {
		case e.kind == unix.DT_DIR:
			err = w.directory(fd, e.name, path)
		case !slices.Contains(w.skip, path):
			w.tree[path], err = w.read(fd, e, filepath.Join(w.top, path))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// listed is what a directory lists.
type listed struct {
	name string
	kind byte // DT_DIR and so on, getdents64(2)
}

// entries lists the directory fd.
func (w *fingerprinting) entries(fd int, rel string) (out []listed, err error) {
	for {
		n, err := again(func() (int, error) { return unix.Getdents(fd, w.content) })
		if err != nil {
			return nil, &fs.PathError{Op: "readdirent", Path: filepath.Join(w.top, rel), Err: err}
		}
		if n == 0 {
			return out, nil
		}
		// d_ino and d_off of 8 bytes, d_reclen of 2, d_type, d_name.
		for list := w.content[:n]; len(list) > 0; list = list[binary.NativeEndian.Uint16(list[16:]):] {
			name, _, _ := bytes.Cut(list[19:], []byte{0})
			if string(name) == "." || string(name) == ".." {
				continue
			}
			e := listed{string(name), list[18]}
			if e.kind == unix.DT_UNKNOWN {
				if e.kind, err = kindAt(fd, e.name); err != nil {
					return nil, &fs.PathError{Op: "lstat", Path: filepath.Join(w.top, rel, e.name), Err: err}
				}
			}
			out = append(out, e)
		}
	}
}

// kindAt is for a file system that lists names without their kinds.
func kindAt(at int, name string) (byte, error) {
	var st unix.Stat_t
	err := unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == unix.ENOENT {
		return unix.DT_UNKNOWN, nil
	}
	return byte(st.Mode & unix.S_IFMT >> 12), err
}

// openAt opens a name for reading, which is no symbolic link.
func openAt(at int, name string, flags int) (int, error) {
	return again(func() (int, error) {
		return unix.Openat(at, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|flags, 0)
	})
}

// again repeats a call that a signal, such as Go's own, has interrupted.
func again(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); err != unix.EINTR {
			return n, err
		}
	}
}

// FingerprintLayer is Fingerprint of a layer of an image, without what depends on
// the time of the unpacking: the times of directories that the layer has no entry
// for, and of whiteouts, which are made for an entry that is no file.
func FingerprintLayer(dir string, img Pushed) (Tree, error) {
	t, err := Fingerprint(dir)
	t.Untime(img.Untimed...)
	for name, e := range t {
		if e.Mode&fs.ModeCharDevice != 0 && e.Rdev == 0 {
			t.Untime(name)
		}
	}
	return t, err
}

// inodeReader has the buffers for reading inodes: new ones for each of thousands
// cost more than what is read into them.
type inodeReader struct {
	content, value []byte // one byte more than the largest attribute, xattr(7)
}

var inodeReaders = sync.Pool{New: func() any {
	return &inodeReader{content: make([]byte, 64<<10+1), value: make([]byte, 64<<10+1)}
}}

// read reads what is no directory. path is the same as e in the directory at.
func (r *inodeReader) read(at int, e listed, path string) (Inode, error) {
	if e.kind == unix.DT_REG {
		return r.readFile(at, e.name, path)
	}
	var st unix.Stat_t
	err := unix.Fstatat(at, e.name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == unix.ENOENT {
		return Inode{Phantom: true}, nil
	}
	if err != nil {
		return Inode{}, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	n := inodeOf(&st)
	switch {
	case n.Mode&fs.ModeSymlink != 0:
		n.Target, err = os.Readlink(path)
	case n.Mode&fs.ModeDevice != 0:
		n.Rdev = st.Rdev
	}
	if err != nil {
		return Inode{}, err
	}
	n.Xattrs, err = r.xattrs(path,
		func(list []byte) (int, error) { return unix.Llistxattr(path, list) },
		func(attr string, value []byte) (int, error) { return unix.Lgetxattr(path, attr, value) })
	return n, err
}

// readFile reads a regular file.
func (r *inodeReader) readFile(at int, name, path string) (Inode, error) {
	fd, err := openAt(at, name, 0)
	if err == unix.ENOENT {
		return Inode{Phantom: true}, nil
	}
	if err != nil {
		return Inode{}, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	n, err := r.inode(fd, path)
	if err != nil {
		return Inode{}, err
	}
	h := sha256.New()
	if err := r.bytes(fd, path, n.Size, func(piece []byte) { h.Write(piece) }); err != nil {
		return Inode{}, err
	}
	n.Sum = hex.EncodeToString(h.Sum(nil))
	return n, nil
}

// bytes reads an open file, which has that size.
func (r *inodeReader) bytes(fd int, path string, size int64, each func(piece []byte)) error {
	for sum := int64(0); ; {
		read, err := again(func() (int, error) { return unix.Read(fd, r.content) })
		if err != nil {
			return &fs.PathError{Op: "read", Path: path, Err: err}
		}
		each(r.content[:read])
		sum += int64(read)
		// A regular file returns less than requested at its end, or before what it cannot read.
		if read == 0 || read < len(r.content) && sum == size {
			return nil
		}
	}
}

// inode is what is known of an open file or directory, without its content.
func (r *inodeReader) inode(fd int, path string) (Inode, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return Inode{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	n := inodeOf(&st)
	var err error
	n.Xattrs, err = r.xattrs(path,
		func(list []byte) (int, error) { return unix.Flistxattr(fd, list) },
		func(attr string, value []byte) (int, error) { return unix.Fgetxattr(fd, attr, value) })
	return n, err
}

// inodeOf is what every kind of entry has, and the size of a regular file.
func inodeOf(st *unix.Stat_t) Inode {
	n := Inode{Mode: modeOf(st.Mode), Uid: st.Uid, Gid: st.Gid, Mtime: time.Unix(st.Mtim.Unix())}
	if n.Mode.IsRegular() {
		n.Size = st.Size
	}
	if !n.Mode.IsDir() {
		n.Nlink = uint64(st.Nlink)
	}
	return n
}

// modeOf is the mode as package os has it.
func modeOf(mode uint32) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	if mode&unix.S_ISUID != 0 {
		m |= fs.ModeSetuid
	}
	if mode&unix.S_ISGID != 0 {
		m |= fs.ModeSetgid
	}
	if mode&unix.S_ISVTX != 0 {
		m |= fs.ModeSticky
	}
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		m |= fs.ModeDir
	case unix.S_IFLNK:
		m |= fs.ModeSymlink
	case unix.S_IFIFO:
		m |= fs.ModeNamedPipe
	case unix.S_IFSOCK:
		m |= fs.ModeSocket
	case unix.S_IFBLK:
		m |= fs.ModeDevice
	case unix.S_IFCHR:
		m |= fs.ModeDevice | fs.ModeCharDevice
	}
	return m
}

func (r *inodeReader) xattrs(name string, list func([]byte) (int, error), get func(string, []byte) (int, error)) (string, error) {
	var pairs []string
	err := r.attributes(name, list, get, func(attr string, value []byte) {
		if !slices.Contains(bookkeeping, attr) {
			pairs = append(pairs, fmt.Sprintf("%s=%q", attr, value))
		}
	})
	slices.Sort(pairs)
	return strings.Join(pairs, " "), err
}

// attributes reads all extended attributes, in the order of the file system.
func (r *inodeReader) attributes(name string, list func([]byte) (int, error), get func(string, []byte) (int, error), each func(attr string, value []byte)) error {
	n, err := list(r.content)
	if errors.Is(err, unix.ENOTSUP) || err == nil && n == 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list xattrs of %s: %w", name, err)
	}
	for attr := range strings.SplitSeq(string(r.content[:n-1]), "\x00") {
		n, err := get(attr, r.value)
		if err != nil {
			return fmt.Errorf("read xattr %s of %s: %w", attr, name, err)
		}
		each(attr, r.value[:n])
	}
	return nil
}

// Untime forgets the times of the named entries, see [Pushed].
func (t Tree) Untime(names ...string) {
	for _, name := range names {
		if n, ok := t[name]; ok {
			n.Mtime = time.Time{}
			t[name] = n
		}
	}
}

func (n Inode) String() string {
	if n.Phantom {
		return "listed, but not there"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%v %d:%d nlink=%d", n.Mode, n.Uid, n.Gid, n.Nlink)
	if n.Rdev != 0 || n.Mode&fs.ModeDevice != 0 {
		fmt.Fprintf(&b, " rdev=%d:%d", unix.Major(n.Rdev), unix.Minor(n.Rdev))
	}
	if n.Sum != "" {
		fmt.Fprintf(&b, " size=%d sha256=%.12s", n.Size, n.Sum)
	}
	if n.Target != "" {
		fmt.Fprintf(&b, " -> %q", n.Target)
	}
	if !n.Mtime.IsZero() {
		fmt.Fprintf(&b, " %s", n.Mtime.UTC().Format(time.RFC3339Nano))
	}
	if n.Xattrs != "" {
		fmt.Fprintf(&b, " %.200s", n.Xattrs)
	}
	return b.String()
}

// same compares what String may shorten, too.
func (n Inode) same(m Inode) bool {
	if !n.Mtime.Equal(m.Mtime) {
		return false
	}
	n.Mtime, m.Mtime = time.Time{}, time.Time{}
	return n == m
}

// Diff describes the first limit differences of got from want, one entry a
// paragraph. It is empty when the trees are equal.
func Diff(want, got Tree, limit int) string {
	names := make([]string, 0, len(want))
	for name := range want {
		names = append(names, name)
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	var b strings.Builder
	found := 0
	for _, name := range names {
		w, inWant := want[name]
		g, inGot := got[name]
		if inWant && inGot && w.same(g) {
			continue
		}
		if found++; found > limit {
			continue
		}
		fmt.Fprintf(&b, "%q\n", name)
		if inWant {
			fmt.Fprintf(&b, "  want %v\n", w)
		}
		if inGot {
			fmt.Fprintf(&b, "  got  %v\n", g)
		}
	}
	if found > limit {
		fmt.Fprintf(&b, "and %d more\n", found-limit)
	}
	return b.String()
}

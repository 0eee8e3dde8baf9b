package kit

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
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
	t := Tree{}
	r := inodeReaders.Get().(*inodeReader)
	defer inodeReaders.Put(r)
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		if slices.Contains(skip, rel) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		t[rel], err = r.read(name, d)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("fingerprint %s: %w", dir, err)
	}
	return t, nil
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

func (r *inodeReader) read(name string, d fs.DirEntry) (Inode, error) {
	if d.Type().IsRegular() {
		return r.readFile(name)
	}
	info, err := d.Info()
	if errors.Is(err, os.ErrNotExist) {
		return Inode{Phantom: true}, nil
	}
	if err != nil {
		return Inode{}, err
	}
	n := inodeOf(info)
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		n.Target, err = os.Readlink(name)
	case info.Mode()&fs.ModeDevice != 0:
		n.Rdev = info.Sys().(*syscall.Stat_t).Rdev
	}
	if err != nil {
		return Inode{}, err
	}
	n.Xattrs, err = r.xattrs(name,
		func(list []byte) (int, error) { return unix.Llistxattr(name, list) },
		func(attr string, value []byte) (int, error) { return unix.Lgetxattr(name, attr, value) })
	return n, err
}

// readFile looks the path of a regular file up once.
func (r *inodeReader) readFile(name string) (Inode, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return Inode{Phantom: true}, nil
	}
	if err != nil {
		return Inode{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Inode{}, err
	}
	n := inodeOf(info)
	n.Size = info.Size()
	h := sha256.New()
	for {
		read, err := f.Read(r.content)
		h.Write(r.content[:read])
		if err == io.EOF {
			break
		}
		if err != nil {
			return Inode{}, err
		}
	}
	n.Sum = hex.EncodeToString(h.Sum(nil))
	fd := int(f.Fd())
	n.Xattrs, err = r.xattrs(name,
		func(list []byte) (int, error) { return unix.Flistxattr(fd, list) },
		func(attr string, value []byte) (int, error) { return unix.Fgetxattr(fd, attr, value) })
	return n, err
}

// inodeOf is what every kind of entry has.
func inodeOf(info fs.FileInfo) Inode {
	st := info.Sys().(*syscall.Stat_t)
	n := Inode{Mode: info.Mode(), Uid: st.Uid, Gid: st.Gid, Mtime: info.ModTime()}
	if !info.IsDir() {
		n.Nlink = uint64(st.Nlink)
	}
	return n
}

func (r *inodeReader) xattrs(name string, list func([]byte) (int, error), get func(string, []byte) (int, error)) (string, error) {
	n, err := list(r.content)
	if errors.Is(err, unix.ENOTSUP) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("list xattrs of %s: %w", name, err)
	}
	var pairs []string
	for attr := range strings.SplitSeq(string(r.content[:n]), "\x00") {
		if attr == "" || slices.Contains(bookkeeping, attr) {
			continue
		}
		n, err := get(attr, r.value)
		if err != nil {
			return "", fmt.Errorf("read xattr %s of %s: %w", attr, name, err)
		}
		pairs = append(pairs, fmt.Sprintf("%s=%q", attr, r.value[:n]))
	}
	slices.Sort(pairs)
	return strings.Join(pairs, " "), nil
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

package damage

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// writer fills layers with what file systems can hold, all of it whole. The same
// seed and number make the same layer.
type writer struct {
	*rand.Rand
	root  string
	dirs  []string            // made so far, relative to root
	names map[string][]string // of other entries, by type: what hardlinks can point to
	count int
}

// writeLayer makes layer number n below root.
func writeLayer(root string, seed, n uint64) error {
	w := &writer{Rand: rand.New(rand.NewPCG(seed, n)), root: root, dirs: []string{"."}, names: map[string][]string{}}
	var err error
	switch {
	case n%100 == 0: // an empty one
		return nil
	case n%100 == 1:
		err = w.wide(700)
	case n%100 == 2:
		err = w.tall(30)
	}
	for range 3 + w.IntN(25) {
		if err == nil {
			err = w.entry()
		}
	}
	if err == nil {
		err = w.finish()
	}
	if err != nil {
		return fmt.Errorf("write layer %d of seed %d: %w", n, seed, err)
	}
	return nil
}

// oddNames are what programs that print, sort or split paths trip over. Some
// sort differently with and without what follows a slash.
var oddNames = []string{
	"new\nline", `"quotes' and \`, "\xff\xfenot utf-8", "-rf", " spaces ", "colon:comma,", "…", ".wh.plain", "...", "tab\tand\x01",
	"*?[a]$(x)", "#comment", "a=b", "%s%n", "fs", "work", "seal", "\\040", "a", "a.b", "a-b", "a b", "A", "é", "e\u0301", "\x7f",
	strings.Repeat("l", 255),
}

// fresh is a path that does not exist, in a directory that does.
func (w *writer) fresh() string {
	w.count++
	dir := w.dirs[w.IntN(len(w.dirs))]
	name := fmt.Sprintf("n%d", w.count)
	if w.IntN(2) == 0 {
		name = oddNames[w.IntN(len(oddNames))]
	}
	rel := filepath.Join(dir, name)
	if _, err := os.Lstat(w.at(rel)); err == nil || len(rel) > 3000 {
		rel = fmt.Sprintf("n%d", w.count)
	}
	return rel
}

func (w *writer) at(rel string) string { return filepath.Join(w.root, rel) }

// Names of the types in writer.names.
const (
	aFile     = "file"
	aSymlink  = "symlink"
	aDevice   = "device"
	aFifo     = "fifo"
	aSocket   = "socket"
	aWhiteout = "whiteout"
)

// entry makes one thing.
func (w *writer) entry() error {
	rel := w.fresh()
	path := w.at(rel)
	var err error
	kind := ""
	switch w.IntN(16) {
	case 0, 1, 2:
		if err := os.Mkdir(path, 0o755); err != nil {
			return err
		}
		w.dirs = append(w.dirs, rel)
		if w.IntN(4) == 0 {
			err = unix.Lsetxattr(path, opaqueMark, []byte("y"), 0)
		}
	case 3, 4:
		kind, err = aSymlink, os.Symlink(w.target(), path)
	case 5:
		kind, err = aFifo, unix.Mknod(path, unix.S_IFIFO|0o600, 0)
	case 6:
		kind, err = aSocket, unix.Mknod(path, unix.S_IFSOCK|0o600, 0)
	case 7:
		format := []uint32{unix.S_IFCHR, unix.S_IFBLK}[w.IntN(2)]
		// XFS keeps no larger numbers.
		kind, err = aDevice, unix.Mknod(path, format|0o600, int(unix.Mkdev(uint32(1+w.IntN(511)), uint32(w.IntN(1<<18)))))
	case 8:
		kind, err = aWhiteout, unix.Mknod(path, unix.S_IFCHR, 0)
	case 9, 10:
		return w.link(path)
	default:
		kind, err = aFile, w.file(path)
	}
	if err != nil {
		return fmt.Errorf("%s %q: %w", kind, rel, err)
	}
	if kind != "" {
		w.names[kind] = append(w.names[kind], rel)
	}
	if err := w.attributes(path, kind); err != nil {
		return fmt.Errorf("%s %q: %w", kind, rel, err)
	}
	return nil
}

// target is at most as long as XFS has room for.
func (w *writer) target() string {
	return []string{"nowhere", "/", "../../x", oddNames[w.IntN(len(oddNames))], strings.Repeat("t/", 500)}[w.IntN(5)]
}

// link is another name of what is there, of whatever type: overlayfs itself
// links whiteouts.
func (w *writer) link(path string) error {
	var all []string
	for _, kind := range []string{aFile, aSymlink, aDevice, aFifo, aSocket, aWhiteout} {
		all = append(all, w.names[kind]...)
	}
	if len(all) == 0 {
		return w.file(path)
	}
	return os.Link(w.at(all[w.IntN(len(all))]), path)
}

// file has no content, some, or a hole.
func (w *writer) file(path string) error {
	size := []int{0, 1, 100, 4095, 4096, 4097, 20_000}[w.IntN(7)]
	content := bytes.Repeat([]byte{byte(w.Uint32())}, size)
	if err := os.WriteFile(path, content, 0o644); err != nil {
		return err
	}
	// Sparse ones; some are larger than what is read at once.
	switch w.IntN(100) {
	case 0:
		return os.Truncate(path, 1<<20+int64(size))
	case 1, 2, 3, 4, 5, 6, 7, 8, 9:
		return os.Truncate(path, 1<<17+int64(size))
	}
	return nil
}

// attributes gives an entry an owner, a mode and extended attributes, as its
// type allows.
func (w *writer) attributes(path, kind string) error {
	if err := os.Lchown(path, w.id(), w.id()); err != nil {
		return err
	}
	if kind != aSymlink && kind != aWhiteout {
		// After the owner: the kernel takes setuid and capabilities away with it.
		if err := unix.Chmod(path, uint32(w.IntN(0o10000))); err != nil {
			return err
		}
	}
	if w.IntN(3) != 0 {
		return nil
	}
	set := func(name, value string) error {
		return os.NewSyscallError("setxattr "+name, unix.Lsetxattr(path, name, []byte(value), 0))
	}
	invent := func(space string) error {
		name, value := w.attribute()
		return set(space+name, value)
	}
	err := invent("trusted.")
	if kind == "" || kind == aFile {
		err = errors.Join(err, invent("user."), invent("user."), set("system.posix_acl_access", accessList))
	}
	if kind == "" {
		err = errors.Join(err, set("system.posix_acl_default", accessList))
	}
	if kind == aFile {
		err = errors.Join(err, set(capability, kit.Capability(1<<w.IntN(30))))
	}
	return err
}

// accessList is a POSIX ACL in the kernel's format, version 2: u::rwx, u:7:r--,
// g::r-x, m::rwx, o::---.
const accessList = "\x02\x00\x00\x00" +
	"\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\x07\x00\x00\x00" + "\x04\x00\x05\x00\xff\xff\xff\xff" +
	"\x10\x00\x07\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"

func (w *writer) attribute() (name, value string) {
	names := []string{"one", "two", "odd\nname", "überlay", "a=b", "sp ace", "\xff"}
	values := []string{"", "1", "a\x00b", "\xff\xfe", "with space=and\n", strings.Repeat("v", 500)}
	return names[w.IntN(len(names))], values[w.IntN(len(values))]
}

func (w *writer) id() int {
	return []int{0, 0, 1000, 65534, 2_000_000, 4_000_000_000}[w.IntN(6)]
}

// wide makes a directory with more names than a walk takes at once.
func (w *writer) wide(n int) error {
	if err := os.Mkdir(w.at("wide"), 0o755); err != nil {
		return err
	}
	for i := range n {
		if err := os.WriteFile(w.at(fmt.Sprintf("wide/%d", i)), nil, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// tall makes directories in directories, to a path of some length.
func (w *writer) tall(n int) error {
	rel := "."
	for range n {
		rel = filepath.Join(rel, strings.Repeat("d", 90))
		if err := os.Mkdir(w.at(rel), 0o700); err != nil {
			return err
		}
		w.dirs = append(w.dirs, rel)
	}
	return nil
}

// finish gives everything a time, what is inside before its directory.
func (w *writer) finish() error {
	var all []string
	if err := filepath.WalkDir(w.root, func(path string, _ fs.DirEntry, err error) error {
		all = append(all, path)
		return err
	}); err != nil {
		return err
	}
	for _, path := range slices.Backward(all) {
		at := unix.Timespec{Sec: w.second(), Nsec: w.Int64N(1e9)}
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "utimensat", Path: path, Err: err}
		}
	}
	return nil
}

// second is within what ext4, xfs and btrfs can all keep: 1901 to 2446.
func (w *writer) second() int64 {
	switch w.IntN(8) {
	case 0:
		return []int64{-1 << 31, -1, 0, 1<<31 - 1, 1 << 31, 15_000_000_000}[w.IntN(6)]
	case 1:
		return 1_700_000_000
	}
	return 1_000_000_000 + w.Int64N(1e9)
}

// change is what a container, or a build step, does through a mount: overlayfs
// itself then writes whiteouts, opaque directories and its bookkeeping. Which
// names there are depends on the layers below.
func change(root string, r *rand.Rand) error {
	names, err := os.ReadDir(root)
	if err != nil {
		return err
	}
	for _, e := range names {
		path := filepath.Join(root, e.Name())
		if r.IntN(2) == 0 {
			continue
		}
		switch {
		case r.IntN(3) == 0:
			err = os.RemoveAll(path)
			if err == nil && e.IsDir() {
				err = os.Mkdir(path, 0o755) // over a whiteout: opaque
			}
		case e.Type()&fs.ModeSymlink != 0:
			err = os.Lchown(path, 5, 6)
		case e.Type().IsRegular():
			err = errors.Join(os.Chmod(path, 0o640), os.Link(path, fmt.Sprintf("%s/again-%x", root, r.Uint64())))
		default:
			err = os.Chmod(path, 0o750)
		}
		if err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(root, fmt.Sprintf("changed-%d", r.Uint32())), []byte("x"), 0o600)
}

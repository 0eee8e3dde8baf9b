package tree

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ErrMounted is wrapped by every error that means: a file system is mounted on
// an entry of the tree, or on the tree's root. What is mounted is not part of
// the layer, and what it covers cannot be examined, so nothing is known of the
// tree. The error names the mount point.
var ErrMounted = errors.New("is a mount point inside a layer, and what is mounted there is not part of the layer; unmount it and try again")

// MountedAt returns the error about a mount point.
func MountedAt(path string) error { return fmt.Errorf("%s %w", path, ErrMounted) }

// Tree is a directory tree as far as it is on one mount. Its methods do not leave that
// mount: what is mounted on an entry is not part of the tree.
type Tree struct {
	root string
	id   uint64 // of its mount, if the kernel reports it
	byID bool
	dir  int // O_PATH, without byID
	dev  uint64
}

// reportsMounts is false in the test of kernels that do not report mount IDs.
var reportsMounts = true

// Open returns the tree below a directory, on the mount of the directory above it: when
// root itself is a mount point, or is covered by one, the error is ErrMounted. The caller
// closes the tree.
func Open(root string) (*Tree, error) {
	t := &Tree{root: root, dir: -1}
	x, err := statx(root)
	if dir := filepath.Dir(root); Missing(err) && IsMountPoint(dir) {
		return nil, MountedAt(dir) // and covers the root
	}
	if err != nil {
		return nil, err
	}
	if x.Attributes&x.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return nil, MountedAt(root)
	}
	if t.id, t.byID = mountID(&x); t.byID {
		return t, nil
	}
	t.dev = unix.Mkdev(x.Dev_major, x.Dev_minor)
	if t.dir, err = unix.Open(filepath.Dir(root), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return nil, &os.PathError{Op: "open", Path: filepath.Dir(root), Err: err}
	}
	if err := t.crossed(filepath.Base(root), root, &x); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// Close releases the descriptors of the tree.
func (t *Tree) Close() {
	if t.dir >= 0 {
		_ = unix.Close(t.dir) // only a place to resolve names from
	}
}

// Path is the path of an entry at a path relative to the root, which is clean.
func (t *Tree) Path(rel string) string {
	if rel == "." {
		return t.root
	}
	return t.root + "/" + rel // often: filepath.Join cleans it again
}

// Lstat is lstat(2) of the entry at a path relative to the root, and fails with ErrMounted for one that is not
// on the tree's own mount.
func (t *Tree) Lstat(rel string) (st unix.Stat_t, err error) {
	path := t.Path(rel)
	x, err := statx(path)
	if err != nil {
		return st, err
	}
	if id, ok := mountID(&x); t.byID && ok {
		if id != t.id {
			return st, MountedAt(path)
		}
	} else if err := t.crossed(filepath.Join(filepath.Base(t.root), rel), path, &x); err != nil {
		return st, err
	}
	return statOf(&x), nil
}

// CheckOpen is the check of Lstat for a descriptor: something may have been
// mounted before it was opened.
func (t *Tree) CheckOpen(fd int, path string) error {
	var x unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &x); err != nil {
		return &os.PathError{Op: "statx", Path: path, Err: err}
	}
	if id, ok := mountID(&x); t.byID && ok && id != t.id {
		return MountedAt(path)
	}
	return nil
}

// crossed is for kernels before Linux 5.8, which do not report mount IDs. A
// mount of the same file system has the same device, so the kernel has to
// resolve the name without leaving the mount (openat2(2), Linux 5.6); still
// older kernels compare devices.
func (t *Tree) crossed(rel, path string, x *unix.Statx_t) error {
	fd, err := unix.Openat2(t.dir, rel, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS,
	})
	switch {
	case err == nil:
		return unix.Close(fd)
	case errors.Is(err, unix.EXDEV):
		return MountedAt(path)
	case errors.Is(err, unix.ELOOP): // the name itself is a symbolic link
		return nil
	case errors.Is(err, unix.ENOSYS):
		if unix.Mkdev(x.Dev_major, x.Dev_minor) != t.dev {
			return MountedAt(path)
		}
		return nil
	}
	return &os.PathError{Op: "open", Path: path, Err: err}
}

// IsMountPoint reports whether a path is known to be one.
func IsMountPoint(path string) bool {
	x, err := statx(path)
	return err == nil && x.Attributes&x.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0
}

func mountID(x *unix.Statx_t) (id uint64, ok bool) {
	return x.Mnt_id, reportsMounts && x.Mask&unix.STATX_MNT_ID != 0
}

// statx is lstat(2) with the mount that the file is on.
func statx(path string) (x unix.Statx_t, err error) {
	for {
		err = unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, &x)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return x, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return x, nil
}

func statOf(x *unix.Statx_t) (st unix.Stat_t) {
	st.Mode = uint32(x.Mode)
	st.Uid, st.Gid = x.Uid, x.Gid
	st.Ino, st.Dev = x.Ino, unix.Mkdev(x.Dev_major, x.Dev_minor)
	st.Rdev = unix.Mkdev(x.Rdev_major, x.Rdev_minor)
	st.Size, st.Blocks = int64(x.Size), int64(x.Blocks)
	set(&st.Nlink, x.Nlink)
	set(&st.Blksize, x.Blksize)
	st.Atim, st.Mtim, st.Ctim = timespec(x.Atime), timespec(x.Mtime), timespec(x.Ctime)
	return st
}

// set assigns to fields whose type depends on the architecture.
func set[T, V ~int32 | ~int64 | ~uint32 | ~uint64](field *T, value V) { *field = T(value) }

// timespec keeps, with 32 bits, times from 1901 to 2038 only.
func timespec(t unix.StatxTimestamp) (ts unix.Timespec) {
	set(&ts.Sec, t.Sec)
	set(&ts.Nsec, t.Nsec)
	return ts
}

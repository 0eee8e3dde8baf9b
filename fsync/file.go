package fsync

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Error is a sync that failed: the kernel could not write, and what it could not
// write is unknown. It may concern anything that was dirty on the file system,
// and must not be retried into success.
type Error struct {
	Op   string // "fsync", "fdatasync", "syncfs" or "sync_file_range"
	Path string
	Err  error
}

// Error implements error.
func (e *Error) Error() string { return e.Op + " " + e.Path + ": " + e.Err.Error() }

// Unwrap returns the kernel's error.
func (e *Error) Unwrap() error { return e.Err }

// cause strips what os adds, which Error contains already.
func cause(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// IsFull reports whether an error means that there is no space: on the file system
// (ENOSPC), or in a quota (EDQUOT), such as a qgroup limit of btrfs.
func IsFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// Dir makes the entries of a directory durable: names that were created in it,
// renamed into it or removed from it.
func Dir(path string) error { return syncPath(path) }

// File makes the content and the inode of a file durable, but not its name, which
// [Dir] of its directory does.
func File(path string) error { return syncPath(path) }

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return errors.Join(&Error{Op: "fsync", Path: path, Err: cause(err)}, f.Close())
	}
	return f.Close()
}

// Rename renames a file and makes the new name durable: after a crash the old
// or the new name is there, and after Rename has returned it is the new one.
// The content must be durable before, or the new name may outlive it. Both
// names must be in the same directory, because only that one is synced.
func Rename(oldpath, newpath string) error {
	if filepath.Dir(oldpath) != filepath.Dir(newpath) {
		return fmt.Errorf("rename %s to %s: not in the same directory", oldpath, newpath)
	}
	if err := os.Rename(oldpath, newpath); err != nil {
		return err
	}
	return Dir(filepath.Dir(newpath))
}

// MkdirAll makes a directory and those above it that are missing, and makes
// the names of the new ones durable. An existing directory is left alone.
func MkdirAll(path string, perm os.FileMode) error {
	if st, err := os.Stat(path); err == nil {
		if !st.IsDir() {
			return &os.PathError{Op: "mkdir", Path: path, Err: syscall.ENOTDIR}
		}
		return nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(path)
	if err := MkdirAll(parent, perm); err != nil {
		return err
	}
	if err := os.Mkdir(path, perm); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return Dir(parent)
}

// Replace writes a file under a temporary name, path with ".new", and renames it to path. With
// it everything is durable that was done to names, attributes and extents on the file system
// before, by one fsync. The file system must have one journal, see [OneJournal].
//
// A crash before Replace has returned may leave the old file, the new one, or a short one.
func Replace(path string, data []byte, perm os.FileMode) (err error) {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, perm)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(data); err != nil {
		return err
	}
	// rename(2) changes the inode (its ctime), so that the fsync reaches it: ext4_rename,
	// xfs_rename.
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return &Error{Op: "fsync", Path: path, Err: cause(err)}
	}
	return nil
}

// Overwrite writes data over the beginning of a file that is there and was synced, and syncs it (fdatasync(2)). Where
// the file has as many bytes already, that is one write and a flush of the cache of the disk: its inode has nothing
// new but times. A crash before Overwrite has returned may leave a mix of old and new bytes.
//
// flushed: the caller relies on [InPlace], and syncs something else next. Then the cache is not flushed.
func Overwrite(path string, data []byte, flushed bool) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if _, err := f.WriteAt(data, 0); err != nil {
		return err
	}
	if flushed && st.Size() >= int64(len(data)) {
		return wait(int(f.Fd()))
	}
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		return &Error{Op: "fdatasync", Path: path, Err: err}
	}
	return nil
}

// WriteFile writes a file under its name and syncs its content. The name is
// durable after the directory has been synced. It is meant for a file that
// is not read before that: a crash may leave it short.
func WriteFile(path string, data []byte, perm os.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, perm)
	if err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Sync(); err != nil {
		return errors.Join(&Error{Op: "fsync", Path: path, Err: cause(err)}, f.Close())
	}
	return f.Close()
}

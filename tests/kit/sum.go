package kit

import (
	"fmt"
	"hash/maphash"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// sumSeed is of this process: a sum is of use nowhere else.
var sumSeed = maphash.MakeSeed()

// Sum is of what stands below dir: names in the order in which they are listed, inodes with
// their numbers, times and blocks, extended attributes, and every byte. Not in it are the places of holes,
// times of birth, and flags of inodes (chattr(1)). Two trees with the same sum, of 64 bits, are the
// same, within this process. It reads without changing a time only where the mount has noatime.
func Sum(dir string) (uint64, error) {
	r := inodeReaders.Get().(*inodeReader)
	defer inodeReaders.Put(r)
	s := &summing{fingerprinting: fingerprinting{inodeReader: r, top: dir}}
	s.h.SetSeed(sumSeed)
	if err := s.directory(unix.AT_FDCWD, dir, "."); err != nil {
		return 0, fmt.Errorf("sum of %s: %w", dir, err)
	}
	return s.h.Sum64(), nil
}

// summing is one in progress. It is quicker than a fingerprint, which people can read.
type summing struct {
	fingerprinting
	h maphash.Hash
}

func (s *summing) directory(at int, name, rel string) error {
	path := filepath.Join(s.top, rel)
	fd, err := openAt(at, name, unix.O_DIRECTORY)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if _, err := s.opened(fd, path); err != nil {
		return err
	}
	entries, err := s.entries(fd, rel)
	if err != nil {
		return err
	}
	maphash.WriteComparable(&s.h, len(entries))
	for _, e := range entries {
		maphash.WriteComparable(&s.h, e)
		path := filepath.Join(rel, e.name)
		switch e.kind {
		case unix.DT_DIR:
			err = s.directory(fd, e.name, path)
		case unix.DT_REG:
			err = s.file(fd, e.name, filepath.Join(s.top, path))
		default:
			err = s.other(fd, e, filepath.Join(s.top, path))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// opened adds the inode of an open file or directory.
func (s *summing) opened(fd int, path string) (unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return st, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	s.inode(&st)
	return st, s.attributes(path,
		func(list []byte) (int, error) { return unix.Flistxattr(fd, list) },
		func(attr string, value []byte) (int, error) { return unix.Fgetxattr(fd, attr, value) },
		s.attribute)
}

func (s *summing) inode(st *unix.Stat_t) {
	here := *st
	here.Dev = 0 // of the loop device that it is on now
	maphash.WriteComparable(&s.h, here)
}

func (s *summing) attribute(attr string, value []byte) {
	maphash.WriteComparable(&s.h, attr)
	maphash.WriteComparable(&s.h, len(value))
	s.h.Write(value)
}

func (s *summing) file(at int, name, path string) error {
	fd, err := openAt(at, name, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	st, err := s.opened(fd, path)
	if err != nil {
		return err
	}
	return s.bytes(fd, path, st.Size, func(piece []byte) { s.h.Write(piece) })
}

// other is what cannot be opened.
func (s *summing) other(at int, e listed, path string) error {
	var st unix.Stat_t
	if err := unix.Fstatat(at, e.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	s.inode(&st)
	if e.kind == unix.DT_LNK {
		n, err := unix.Readlinkat(at, e.name, s.content)
		if err != nil {
			return &fs.PathError{Op: "readlink", Path: path, Err: err}
		}
		s.h.Write(s.content[:n])
	}
	return s.attributes(path,
		func(list []byte) (int, error) { return unix.Llistxattr(path, list) },
		func(attr string, value []byte) (int, error) { return unix.Lgetxattr(path, attr, value) },
		s.attribute)
}

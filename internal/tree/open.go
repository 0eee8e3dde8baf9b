package tree

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const openFlags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC

// noOpenat2 is set once the kernel has refused openat2(2): Linux before 5.6, or
// a seccomp filter that does not know it and returns EPERM or ENOSYS.
var noOpenat2 atomic.Bool

// openBelow opens the directory name in the directory fd. The error is EXDEV
// when a file system, or another part of the same one, is mounted there.
func openBelow(fd int, name string) (*os.File, error) {
	if !noOpenat2.Load() {
		how := unix.OpenHow{Flags: openFlags, Resolve: unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS}
		var opened int
		err := ignoringEINTR(func() (err error) {
			opened, err = unix.Openat2(fd, name, &how)
			return err
		})
		switch {
		case err == nil:
			return os.NewFile(uintptr(opened), name), nil
		case errors.Is(err, unix.ENOSYS):
			noOpenat2.Store(true)
		case !errors.Is(err, unix.EPERM):
			return nil, err
		}
	}
	opened, err := unix.Openat(fd, name, openFlags, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(opened), name)
	above, err := mountOf(fd)
	if err == nil {
		var here int
		if here, err = mountOf(opened); err == nil && here != above {
			err = unix.EXDEV
		}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// OpenAt opens the entry at a path below the directory root, which may be open with O_PATH only. No link is
// followed, and the error is ErrMounted where something is mounted. To open a device may do
// something: callers that do not know what is there open it with O_PATH first.
func OpenAt(root int, rel string, flags uint64) (fd int, err error) {
	for {
		fd, err = unix.Openat2(root, rel, &unix.OpenHow{
			Flags:   flags | unix.O_NOFOLLOW | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
		})
		if errors.Is(err, unix.EXDEV) {
			return -1, ErrMounted
		}
		// EAGAIN: something was renamed meanwhile (openat2(2)).
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return fd, err
		}
	}
}

// openAbove opens the directory above an open one, which must have the inode
// number ino: another process may have moved the directory meanwhile.
func openAbove(f *os.File, ino uint64) (*os.File, error) {
	up, err := openBelow(int(f.Fd()), "..")
	if err != nil {
		return nil, os.NewSyscallError("open ..", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(up.Fd()), &st); err != nil {
		return nil, errors.Join(os.NewSyscallError("fstat", err), up.Close())
	}
	if st.Ino != ino {
		return nil, errors.Join(fmt.Errorf("a directory was moved while its tree was deleted"), up.Close())
	}
	return up, nil
}

// mountOf returns the number of the mount that an open descriptor is on
// (proc_pid_fdinfo(5)). Unlike statx(2), it works on every kernel.
func mountOf(fd int) (int, error) {
	f, err := os.Open("/proc/thread-self/fdinfo/" + strconv.Itoa(fd))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if value, ok := strings.CutPrefix(s.Text(), "mnt_id:"); ok {
			return strconv.Atoi(strings.TrimSpace(value))
		}
	}
	return 0, fmt.Errorf("%s has no mnt_id", f.Name())
}

// SameMount reports whether two existing directories are on one mount of one
// file system, so that rename(2) works between them. Subvolumes of btrfs count
// as file systems of their own.
func SameMount(a, b string) (bool, error) {
	var (
		mounts  [2]int
		devices [2]uint64
	)
	for i, path := range []string{a, b} {
		f, err := os.Open(path)
		if err != nil {
			return false, err
		}
		var st unix.Stat_t
		if err = unix.Fstat(int(f.Fd()), &st); err == nil {
			mounts[i], err = mountOf(int(f.Fd()))
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return false, fmt.Errorf("mount of %s: %w", path, err)
		}
		devices[i] = st.Dev
	}
	return mounts[0] == mounts[1] && devices[0] == devices[1], nil
}

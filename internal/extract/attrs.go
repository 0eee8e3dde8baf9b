package extract

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unsafe"

	"github.com/containerd/log"
	"github.com/moby/sys/userns"
	"golang.org/x/sys/unix"
)

// attributes are those that an entry of a tar gives to an inode.
type attributes struct {
	uid, gid int
	mode     uint32 // permissions, setuid, setgid and sticky
	times    [2]unix.Timespec
	xattrs   []xattr
}

type xattr struct{ name, value string }

const (
	permissions = 0o777
	modeBits    = 0o7777
)

func attributesOf(h *tar.Header) attributes {
	a := attributes{uid: h.Uid, gid: h.Gid, mode: uint32(h.Mode & modeBits), times: timesOf(h)}
	// One after another in the order of their names: containerd's order is that of a map.
	for _, key := range slices.Sorted(maps.Keys(h.PAXRecords)) {
		if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
			a.xattrs = append(a.xattrs, xattr{name, h.PAXRecords[key]})
		}
	}
	return a
}

// timesOf returns the times of access and modification, as containerd sets them: what is
// before 1970 or does not fit into 64 bits of nanoseconds is 1970 (pkg/archive/time.go).
func timesOf(h *tar.Header) [2]unix.Timespec {
	access := h.AccessTime
	if access.Before(h.ModTime) {
		access = h.ModTime
	}
	return [2]unix.Timespec{timespec(access), timespec(h.ModTime)}
}

var (
	firstTime = time.Unix(0, 0)
	lastTime  = time.Unix(0, 1<<63-1)
)

func timespec(t time.Time) unix.Timespec {
	if t.Before(firstTime) || t.After(lastTime) {
		t = firstTime
	}
	return unix.NsecToTimespec(t.UnixNano())
}

// needChown reports whether a new inode has another owner than it is to have. The kernel
// gives it the group of a setgid directory around it, and on some mounts always
// (grpid, ext4(5)).
func (a *attributes) needChown(st *unix.Stat_t) bool {
	return st.Uid != uint32(a.uid) || st.Gid != uint32(a.gid)
}

// needChmod reports whether a new inode has another mode than it is to have, after the
// steps before: the umask and a default access control list take bits away, and an
// access control list is a part of the mode (acl(5)). It is made without the setuid and
// setgid bits, which a change of the owner takes away.
func (a *attributes) needChmod(st *unix.Stat_t) bool {
	return st.Mode&modeBits != a.mode || len(a.xattrs) > 0
}

// owned wraps the error of a chown as containerd does.
func (a *attributes) owned(name string, err error) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf("change the owner of %q to %d:%d: %w", name, a.uid, a.gid, err)
	if errors.Is(err, unix.EINVAL) && userns.RunningInUserNS() {
		err = fmt.Errorf("%w (more subordinate ids are needed, in /etc/subuid and /etc/subgid)", err)
	}
	return err
}

// setXattrs sets the extended attributes with set. ordinary: it is a regular file or a
// directory. Ignored is what containerd ignores (createTarFile, pkg/archive/tar.go):
// attributes of the administrator, what the file system does not have, and user
// attributes of other kinds of files (xattr(7)).
func (a *attributes) setXattrs(ctx context.Context, name string, ordinary bool, set func(name string, value []byte) error) error {
	for _, x := range a.xattrs {
		err := error(unix.ENOTSUP)
		if !strings.HasPrefix(x.name, "trusted.") {
			err = set(x.name, []byte(x.value))
		}
		switch {
		case err == nil:
		case errors.Is(err, unix.ENOTSUP), errors.Is(err, unix.EPERM) && strings.HasPrefix(x.name, "user.") && !ordinary:
			log.G(ctx).WithError(err).WithField("entry", name).Warnf("ignored xattr %s in archive", x.name)
		default:
			return fmt.Errorf("set the extended attribute %q of %q: %w", x.name, name, err)
		}
	}
	return nil
}

// futimens is futimens(3): utimensat(2) without a path. AT_EMPTY_PATH is for Linux 5.8 and
// newer only.
func futimens(fd int, times *[2]unix.Timespec) error {
	_, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(times)), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

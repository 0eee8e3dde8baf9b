package disk

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// FS is a kind of file system.
type FS string

// The file systems that a Disk can hold.
const (
	Ext4  FS = "ext4"
	XFS   FS = "xfs"
	Btrfs FS = "btrfs"
)

// MinSize returns the smallest disk that the file system's mkfs accepts,
// rounded up to something round.
func (f FS) MinSize() int64 {
	switch f {
	case XFS:
		return 320 << 20
	case Btrfs:
		return 128 << 20
	}
	return 64 << 20
}

// Valid reports whether this is a file system that a Disk can hold.
func (f FS) Valid() bool { return slices.Contains([]FS{Ext4, XFS, Btrfs}, f) }

// uuid is the same for every disk, so that the bytes of two disks with the same
// content differ as little as possible.
const uuid = "d15c0000-0000-4000-8000-000000000001"

// Format makes a file system. Everything that the kernel would do later in the
// background is done at once: it would appear in the logs of other tests.
func (v *Volume) Format(f FS, extra ...string) error {
	var cmd []string
	switch f {
	case Ext4:
		cmd = []string{"mkfs.ext4", "-q", "-F", "-b", "4096", "-U", uuid,
			"-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0,hash_seed=" + uuid}
	case XFS:
		cmd = []string{"mkfs.xfs", "-q", "-f", "-K", "-m", "uuid=" + uuid}
	case Btrfs:
		cmd = []string{"mkfs.btrfs", "-q", "-f", "-K"} // it refuses a UUID that another disk has
	default:
		return fmt.Errorf("format %s: unknown file system %q", v.Device(), f)
	}
	cmd = append(append(cmd, extra...), v.Device())
	// mkfs.btrfs asks each loop device that is mounted anywhere for its file, and ends before it has written
	// anything when another test has just detached one.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput()
		if err == nil {
			return nil
		}
		if !bytes.Contains(out, []byte("cannot check mount status")) || time.Now().After(deadline) {
			return fmt.Errorf("%s: %w: %s", strings.Join(cmd, " "), err, out)
		}
	}
}

// Mount mounts the disk on dir. The options are those of mount(8) that the file
// system itself understands, and "ro".
func (v *Volume) Mount(f FS, dir string, options ...string) error {
	if err := kit.Private(); err != nil {
		return err
	}
	var flags uintptr
	options = slices.Clone(options)
	options = slices.DeleteFunc(options, func(o string) bool {
		if o == "ro" {
			flags |= unix.MS_RDONLY
		}
		return o == "ro" || o == ""
	})
	if f == XFS {
		// Several disks with one UUID may be mounted at once.
		options = append(options, "nouuid")
	}
	// A process that opens the device exclusively for a moment, such as a probe for file
	// systems, keeps it busy.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Mount(v.Device(), dir, string(f), flags, strings.Join(options, ","))
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("mount %s (%s) on %s: %w", v.Device(), f, dir, err)
		}
	}
	v.mounts = append(v.mounts, dir)
	return nil
}

// Unmount unmounts everything that Mount has mounted, last first, and waits until
// the kernel has released the device. A file system whose processes were just
// killed can be busy for a moment.
func (v *Volume) Unmount() error { return v.UnmountWithin(30 * time.Second) }

// UnmountWithin is Unmount with another patience. It returns EBUSY when that
// ends.
func (v *Volume) UnmountWithin(limit time.Duration) error {
	if len(v.mounts) == 0 {
		return nil
	}
	deadline := time.Now().Add(limit)
	for len(v.mounts) > 0 {
		dir := v.mounts[len(v.mounts)-1]
		err := unix.Unmount(dir, 0)
		switch {
		case errors.Is(err, unix.EBUSY) && time.Now().Before(deadline):
			time.Sleep(5 * time.Millisecond)
			continue
		case err != nil:
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		v.mounts = v.mounts[:len(v.mounts)-1]
	}
	return kit.WaitReleased(v.Device(), time.Until(deadline))
}

// Shutdown makes the mounted file system fail every request from now on, as if
// its cable had been cut: nothing that it holds in memory reaches the disk.
// ext4 and xfs can do that; btrfs of Linux 6.18 cannot (ENOTTY).
func Shutdown(dir string) error {
	const (
		ioctlShutdown  = 0x8004587d // FS_IOC_SHUTDOWN, first XFS_IOC_GOINGDOWN
		withoutLogSync = 2
	)
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("shut down %s: %w", dir, err)
	}
	defer unix.Close(fd)
	if err := unix.IoctlSetPointerInt(fd, ioctlShutdown, withoutLogSync); err != nil {
		return fmt.Errorf("shut down %s: %w", dir, err)
	}
	return nil
}

package fsync

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrUnsuitable is wrapped by the errors of Inspect that mean: this file system
// cannot keep the promise, use another one.
var ErrUnsuitable = errors.New("unsuitable file system")

// Warning is a circumstance that weakens the promise, with the cure. It does not break
// the promise in every case.
type Warning struct {
	About   string // one of the constants below
	Problem string
	Cure    string
}

// What a Warning is about.
const (
	AboutKernel    = "kernel"
	AboutType      = "type"      // of the file system
	AboutNoJournal = "journal"   // ext4 has none
	AboutData      = "data"      // the mode of ext4's journal
	AboutBarrier   = "barrier"   // the cache of the disk is not flushed
	AboutUnknown   = "not known" // the options of ext4 cannot be read
)

// The numbers are in statfs(2); fuse2 is what some kernels report for fuseblk.
const (
	magicExt4    = unix.EXT4_SUPER_MAGIC
	magicXFS     = unix.XFS_SUPER_MAGIC
	magicBtrfs   = unix.BTRFS_SUPER_MAGIC
	magicF2FS    = unix.F2FS_SUPER_MAGIC
	magicZFS     = 0x2fc12fc1
	magicOverlay = unix.OVERLAYFS_SUPER_MAGIC
	magicTmpfs   = unix.TMPFS_MAGIC
	magicRamfs   = unix.RAMFS_MAGIC
	magicFUSE    = unix.FUSE_SUPER_MAGIC
	magicNFS     = unix.NFS_SUPER_MAGIC
	magicCIFS    = 0xff534d42
	magicSMB2    = 0xfe534d42
	magic9P      = unix.V9FS_MAGIC
)

// refused maps a file system to the reason why it cannot be a root.
var refused = map[int64]string{
	magicTmpfs:   "tmpfs: nothing on it survives a power cut",
	magicRamfs:   "ramfs: nothing on it survives a power cut",
	magicOverlay: "overlay: syncfs on an overlay mount does not sync every layer below it",
	magicFUSE:    "FUSE: the kernel does not pass syncfs on to the FUSE server",
	magicNFS:     "NFS: the server decides what is durable, and overlay upper directories do not work on it",
	magicCIFS:    "SMB: the server decides what is durable, and overlay upper directories do not work on it",
	magicSMB2:    "SMB: the server decides what is durable, and overlay upper directories do not work on it",
	magic9P:      "9p: the server decides what is durable, and overlay upper directories do not work on it",
}

// known are the file systems on which the order of Prepare and Commit is
// crash-tested.
var known = []int64{magicExt4, magicXFS, magicBtrfs}

// Inspect checks the file system below root, which must exist. An error that wraps
// ErrUnsuitable is the reason why it cannot be used; warnings are what weakens the
// promise.
func Inspect(root string) ([]Warning, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: root, Err: err}
	}
	magic := int64(st.Type) & 0xffffffff // negative on 32 bit for SMB and btrfs
	if reason, bad := refused[magic]; bad {
		return nil, fmt.Errorf("%s is on %s: %w; use ext4, xfs or btrfs", root, reason, ErrUnsuitable)
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		return nil, fmt.Errorf("%s is on a file system mounted read-only: %w; remount it read-write", root, ErrUnsuitable)
	}

	var warnings []Warning
	if !slices.Contains(known, magic) {
		warnings = append(warnings, Warning{
			About:   AboutType,
			Problem: fmt.Sprintf("%s is on a file system (statfs type %#x) on which no crash test was made", root, magic),
			Cure:    "use ext4, xfs or btrfs",
		})
	}
	if magic == magicExt4 {
		warnings = append(warnings, inspectExt4(root)...)
	}
	if w := inspectKernel(); w != nil {
		warnings = append(warnings, *w)
	}
	return warnings, nil
}

// SameFilesystem reports whether two existing paths are on one file system.
func SameFilesystem(a, b string) (bool, error) {
	var sa, sb unix.Stat_t
	if err := unix.Stat(a, &sa); err != nil {
		return false, &os.PathError{Op: "stat", Path: a, Err: err}
	}
	if err := unix.Stat(b, &sb); err != nil {
		return false, &os.PathError{Op: "stat", Path: b, Err: err}
	}
	return sa.Dev == sb.Dev, nil
}

// inspectExt4 checks how an ext4 is mounted.
func inspectExt4(root string) []Warning {
	device, err := deviceOf(root)
	if err != nil {
		return []Warning{{
			About:   AboutUnknown,
			Problem: fmt.Sprintf("cannot determine the journal mode of ext4 below %s: %v", root, err),
			Cure:    "make /sys visible to the program, or check with dumpe2fs -h and /proc/mounts",
		}}
	}
	options, err := ext4Options(device)
	if err != nil {
		// ext2 and ext3 file systems driven by ext4 are listed too; a masked
		// /proc (a container) is not.
		return []Warning{{
			About:   AboutUnknown,
			Problem: fmt.Sprintf("cannot determine the journal mode of ext4 below %s: %v", root, err),
			Cure:    "make /proc/fs visible to the program, or check with dumpe2fs -h and /proc/mounts",
		}}
	}
	return ext4Warnings(root, options)
}

// deviceOf returns the name of the block device of a file system, as in /dev and
// /proc/fs/ext4. sysfs knows it by number.
func deviceOf(dir string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev))))
	return filepath.Base(link), err
}

// ext4Options returns the options with which the ext4 of a device is mounted
// (fs/ext4/super.c, ext4_seq_options_show): "barrier" or "nobarrier", and "data=..."
// only if there is a journal.
func ext4Options(device string) ([]string, error) {
	return readLines(filepath.Join("/proc/fs/ext4", device, "options"))
}

func ext4Warnings(root string, options []string) []Warning {
	var warnings []Warning
	mode := ""
	for _, o := range options {
		if v, ok := strings.CutPrefix(o, "data="); ok {
			mode = v
		}
	}
	switch mode {
	case "":
		warnings = append(warnings, Warning{
			About:   AboutNoJournal,
			Problem: fmt.Sprintf("ext4 below %s has no journal: a power cut can damage any file, also old ones", root),
			Cure:    "unmount it and run tune2fs -O has_journal on the device",
		})
	case "writeback":
		warnings = append(warnings, Warning{
			About:   AboutData,
			Problem: fmt.Sprintf("ext4 below %s is mounted data=writeback: after a power cut, files that were being written may hold old blocks", root),
			Cure:    "mount it with data=ordered",
		})
	}
	if slices.Contains(options, "nobarrier") || slices.Contains(options, "barrier=0") {
		warnings = append(warnings, Warning{
			About:   AboutBarrier,
			Problem: fmt.Sprintf("ext4 below %s is mounted nobarrier: what the disk holds in its cache is lost in a power cut", root),
			Cure:    "mount it with barrier=1",
		})
	}
	return warnings
}

func readLines(file string) ([]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var lines []string
	s := bufio.NewScanner(f)
	for s.Scan() {
		lines = append(lines, s.Text())
	}
	return lines, s.Err()
}

func inspectKernel() *Warning {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil
	}
	release := unix.ByteSliceToString(u.Release[:])
	if atLeast(release, 5, 17) {
		return nil
	}
	return &Warning{
		About:   AboutKernel,
		Problem: fmt.Sprintf("kernel %s is older than 5.17: syncfs does not report every error", release),
		Cure:    "run Linux 5.17 or newer",
	}
}

// atLeast compares "6.18.44-fc" with a version. A release that cannot be read
// counts as old, so that the warning is given.
func atLeast(release string, major, minor int) bool {
	parts := strings.SplitN(release, ".", 3)
	if len(parts) < 2 {
		return false
	}
	a, err := strconv.Atoi(parts[0])
	if err != nil {
		return false
	}
	end := strings.IndexFunc(parts[1], func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(parts[1])
	}
	b, err := strconv.Atoi(parts[1][:end])
	if err != nil {
		return false
	}
	return a > major || a == major && b >= minor
}

package fsync

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// OneJournal reports whether the file system below dir has one journal for all that is done to
// names, attributes and extents, which one fsync writes up to the last change. Then [Files]
// can be synced alone. It is so on xfs, and on ext4 with data=ordered and without
// fast_commit. It is not so on btrfs: an fsync there writes a log of one file.
//
// Linux must be 5.19 or newer: before, the target of a symbolic link of 60 bytes and more is
// on ext4 data of an inode that cannot be opened, and not in the journal.
func OneJournal(dir string) bool {
	var (
		fs unix.Statfs_t
		u  unix.Utsname
	)
	if unix.Statfs(dir, &fs) != nil || unix.Uname(&u) != nil || !atLeast(unix.ByteSliceToString(u.Release[:]), 5, 19) {
		return false
	}
	switch int64(fs.Type) & 0xffffffff {
	case magicXFS:
		return true
	case magicExt4:
		device, err := deviceOf(dir)
		if err != nil {
			return false
		}
		options, err := ext4Options(device)
		if err != nil || !slices.Contains(options, "data=ordered") {
			return false
		}
		fast, err := fastCommit(device)
		return err == nil && !fast
	}
	return false
}

// InPlace reports whether what is overwritten below dir, and written out, is durable after the next fdatasync of
// anything that was overwritten on the file system of other: dir is on the same one, which is an ext4 with
// [OneJournal]. It has the new bytes where the old ones were, so no journal has to know of them, and
// the fdatasync flushes the cache of the same disk (ext4_sync_file). xfs may share blocks with a copy, and then moves them.
func InPlace(dir, other string) bool {
	var (
		fs   unix.Statfs_t
		a, b unix.Stat_t
	)
	if unix.Statfs(dir, &fs) != nil || int64(fs.Type)&0xffffffff != magicExt4 {
		return false
	}
	return unix.Stat(dir, &a) == nil && unix.Stat(other, &b) == nil && a.Dev == b.Dev && OneJournal(dir)
}

// fastCommit reports whether an ext4 has a journal for single files (fast_commit, ext4(5)).
// The kernel shows that nowhere but on the disk.
func fastCommit(device string) (bool, error) {
	f, err := os.Open(filepath.Join("/dev", device))
	if err != nil {
		return false, err
	}
	defer f.Close()
	var super [0x60]byte
	if _, err := f.ReadAt(super[:], 1024); err != nil {
		return false, err
	}
	// s_feature_compat, and EXT4_FEATURE_COMPAT_FAST_COMMIT (fs/ext4/ext4.h).
	return binary.LittleEndian.Uint32(super[0x5c:])&0x400 != 0, nil
}

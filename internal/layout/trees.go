package layout

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
)

// DirectoryID returns the number of a snapshot's directory; ok is false for every
// other name, also for a number that is not spelled as the snapshotter does.
func DirectoryID(name string) (id uint64, ok bool) {
	id, err := strconv.ParseUint(name, 10, 64)
	return id, err == nil && strconv.FormatUint(id, 10) == name
}

// BootOf returns the boot in the name of a tree in healing/ (<id>.<boot>) or
// replaced/ (<id>.<boot>.<unique>), "" when there is none: earlier versions gave
// trees in healing/ their number only.
func BootOf(name string, replaced bool) string {
	_, boot, _ := strings.Cut(name, ".")
	if end := strings.LastIndexByte(boot, '.'); replaced && end >= 0 {
		boot = boot[:end]
	}
	return boot
}

// LayerOf returns the number of the layer that a tree in healing/ or replaced/ is,
// or was.
func LayerOf(dir string) (uint64, error) {
	number, _, _ := strings.Cut(filepath.Base(dir), ".")
	return strconv.ParseUint(number, 10, 64)
}

// BootID names this boot of the kernel (random(4)).
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// NewRunID returns 16 hexadecimal digits at random. They name a run of the daemon,
// and make the names of trees in removing/ and replaced/ unique.
func NewRunID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24
	return hex.EncodeToString(b[:])
}

// Place makes what was extracted beside the tree of a snapshot its tree. It fails with ENOTEMPTY or EEXIST
// when that one has anything in it, and with ENOENT when nothing lies beside it. Neither name is synced.
func Place(r Root, id uint64) error {
	from, to := r.Applied(id), r.Tree(id)
	// os.Rename refuses every directory in the place of the new name; rename(2) replaces an empty one.
	if err := unix.Rename(from, to); err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

// PlaceAgain is Place for a layer that is committed, of which the machine forgot the place when it went down. Place
// has succeeded before, so what its tree has in it now was deleted by then: it stays, beside the tree. The place is synced.
func PlaceAgain(r Root, id uint64) error {
	err := Place(r, id)
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
		// In two steps, of which the second is what another call does after a crash in between.
		if err = os.Rename(r.Tree(id), filepath.Join(r.Dir(id), "deleted")); err == nil {
			err = Place(r, id)
		}
	}
	if err != nil {
		return err
	}
	return fsync.Dir(r.Dir(id))
}

// Exchange swaps two directories at once (renameat2(2)). Where the second is gone, the first
// takes its name.
func Exchange(dir, place string) error {
	err := unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, place, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.ENOENT) {
		return os.Rename(dir, place)
	}
	if err != nil {
		return &os.LinkError{Op: "exchange", Old: dir, New: place, Err: err}
	}
	return nil
}

package overlayutil

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/errdefs"
)

// ErrUnsupported is wrapped by the errors of Check.
var ErrUnsupported = errors.New("overlay mounts do not work")

// Check mounts an overlay below dir, with two lower directories and an upper
// one, and unmounts it. The error names what is missing: root, d_type, or
// another reason that the kernel returns.
func Check(dir string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w below %s: mounting needs root, and this is user %d", ErrUnsupported, dir, os.Geteuid())
	}
	if err := overlayutils.Supported(dir); err != nil {
		return fmt.Errorf("%w below %s: %w", ErrUnsupported, dir, err)
	}
	return nil
}

// IDMappedMounts reports whether the kernel can map the owners of overlay's
// lower directories, so that a container in a user namespace needs no chown
// (Linux 5.19).
func IDMappedMounts() bool {
	ok, err := overlayutils.SupportsIDMappedMounts()
	return err == nil && ok
}

// NeedsUserXattr reports whether overlay mounts of this process must use the
// user's attributes, because those of root are out of reach: in a user
// namespace.
func NeedsUserXattr(dir string) bool {
	needs, err := overlayutils.NeedsUserXAttr(dir)
	return err == nil && needs
}

// forbidden maps mount options that a configuration may not hold, with any value
// or with one, to the reason. index and nfs_export have two values and no other
// spelling (fs/overlayfs/params.c, ovl_parameter_bool).
// See Documentation/filesystems/overlayfs.rst in the kernel's source.
var forbidden = map[string]string{
	"lowerdir":  "the snapshotter names the directories itself",
	"lowerdir+": "the snapshotter names the directories itself",
	"datadir+":  "the snapshotter names the directories itself",
	"upperdir":  "the snapshotter names the directories itself",
	"workdir":   "the snapshotter names the directories itself",

	"volatile":       unsynced,
	"fsync=volatile": unsynced, // the newer spelling; containerd knows both (core/mount/temp.go:89)

	"redirect_dir=on": "a layer whose directories point elsewhere is not whole by itself",
	"metacopy=on":     "a layer whose files have their content elsewhere is not whole by itself",
	"verity=on":       "it turns metacopy on, and a layer whose files have their content elsewhere is not whole by itself",
	"verity=require":  "it turns metacopy on, and a layer whose files have their content elsewhere is not whole by itself",

	"index=on":      stale,
	"nfs_export=on": stale,
}

const (
	unsynced = "the kernel then skips every sync of the upper directory, and a crash makes it unusable"
	stale    = "the kernel then ties an upper directory to the inode of its lower one, and the next mount of an existing container fails " +
		"with ESTALE after a layer below it was healed"
)

// CheckOptions refuses options for overlay mounts that break a promise. The
// error is containerd's InvalidArgument.
func CheckOptions(options []string) error {
	for _, o := range options {
		key, _, _ := strings.Cut(o, "=")
		reason, bad := forbidden[key]
		if !bad {
			reason, bad = forbidden[o]
		}
		if bad {
			return fmt.Errorf("mount option %q: %s: %w", o, reason, errdefs.ErrInvalidArgument)
		}
		if o == "" || strings.ContainsAny(o, ",\x00") {
			return fmt.Errorf("mount option %q: give one option per item: %w", o, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

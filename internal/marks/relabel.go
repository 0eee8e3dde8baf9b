package marks

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/continuity/sysx"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// labelXattrs name an entry for a security module. Unlike security.ima and
// security.evm, they do not depend on the content or the inode.
var labelXattrs = []string{"security.selinux", "security.SMACK64"}

// Relabel gives every entry of a new tree the security labels that the entry of
// the same path in the old tree has, or else those of the closest directory
// above it there. The kernel has labeled the new tree for the place where it was
// made, and renaming keeps labels.
//
// Nothing of this is essential: what cannot be read or set stays as it is. The
// old tree may be damaged, so no link and no mount in it is followed. The error
// is that of ctx.
func Relabel(ctx context.Context, newTree, oldTree string) error {
	old, err := unix.Open(oldTree, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil // missing: that is its damage
	}
	defer unix.Close(old)
	var around []map[string]string // labels of the directories around an entry, by depth
	return filepath.WalkDir(newTree, func(path string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			log.G(ctx).WithError(err).WithField("path", path).Warn("the entry keeps the security label of a new file")
			return nil
		}
		rel, err := filepath.Rel(newTree, path)
		if err != nil {
			return nil
		}
		depth := 0
		if rel != "." {
			depth = 1 + strings.Count(rel, "/")
		}
		labels := labelsOf(old, rel)
		if len(labels) == 0 && depth > 0 {
			labels = around[depth-1]
		}
		if d.IsDir() {
			around = append(around[:depth], labels)
		}
		for name, value := range labels {
			if have, err := sysx.LGetxattr(path, name); err == nil && string(have) == value {
				continue
			}
			if err := sysx.LSetxattr(path, name, []byte(value), 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
				log.G(ctx).WithError(err).WithField("path", path).Warn("the entry keeps the security label of a new file")
			}
		}
		return nil
	})
}

// labelsOf reads the labels of an entry below a directory; none when there is no
// such entry.
func labelsOf(dir int, rel string) map[string]string {
	fd, err := unix.Openat2(dir, rel, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	labels := map[string]string{}
	for _, name := range labelXattrs {
		// fgetxattr(2) takes no O_PATH descriptor; the link leads to the entry
		// itself, be it a symbolic link (proc(5)).
		if value, err := sysx.Getxattr("/proc/self/fd/"+strconv.Itoa(fd), name); err == nil {
			labels[name] = string(value)
		}
	}
	return labels
}

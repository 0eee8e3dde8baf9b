package snapshotter

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"
)

// diskUsage counts what the tree below root occupies, as containerd's
// snapshotters do (DiskUsage in continuity/fs): every inode once, 512 bytes for
// each unit of st_blocks. It leaves the times of access alone, because the CRI
// plugin asks every 10 seconds, also while the snapshot is written, and it stays
// on the mount that root is on. What disappears while it counts is not counted;
// a missing root is an error.
func diskUsage(ctx context.Context, root string) (snapshots.Usage, error) {
	c := usageCounter{ctx: ctx, seen: map[deviceInode]struct{}{}}
	st, err := statUsage(root)
	if err != nil {
		return snapshots.Usage{}, err
	}
	c.mount = st.Mnt_id
	err = c.add(root, st)
	return c.Usage, err
}

type deviceInode struct {
	major, minor uint32
	ino          uint64
}

type usageCounter struct {
	snapshots.Usage
	ctx   context.Context
	mount uint64
	seen  map[deviceInode]struct{}
}

func statUsage(path string) (*unix.Statx_t, error) {
	st := &unix.Statx_t{}
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, st); err != nil {
		return nil, &os.PathError{Op: "statx", Path: path, Err: err}
	}
	return st, nil
}

func (c *usageCounter) add(path string, st *unix.Statx_t) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	if st.Mnt_id != c.mount { // both are 0 before Linux 5.8
		return nil
	}
	dir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	again := false
	if st.Nlink > 1 && !dir {
		id := deviceInode{st.Dev_major, st.Dev_minor, st.Ino}
		_, again = c.seen[id]
		c.seen[id] = struct{}{}
	}
	if !again {
		c.Inodes++
		c.Size += int64(st.Blocks) * 512
	}
	if !dir {
		return nil
	}
	names, err := namesIn(path)
	if err != nil {
		return unlessGone(err)
	}
	for _, name := range names {
		child := filepath.Join(path, name)
		st, err := statUsage(child)
		if err == nil {
			err = c.add(child, st)
		}
		if unlessGone(err) != nil {
			return err
		}
	}
	return nil
}

func unlessGone(err error) error {
	if isNotExist(err) {
		return nil
	}
	return err
}

// namesIn lists a directory without changing its time of access.
func namesIn(path string) ([]string, error) {
	flags := unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NOATIME
	f, err := os.OpenFile(path, flags, 0)
	if errors.Is(err, unix.EPERM) { // another user's, in a user namespace (open(2))
		f, err = os.OpenFile(path, flags&^unix.O_NOATIME, 0)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

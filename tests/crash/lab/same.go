package lab

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// More than half of the cuts leave disks that differ in what no file system shows: in blocks that nothing
// refers to, because the power went before the journal had it, or in a journal that was written to its
// place already. Once such a disk is mounted, its content is that of a disk before it, byte for
// byte. The snapshotter and the oracle read that content, so they would see the same
// again. It is judged again all the same, by what was promised at its own points.

// content identifies what an examination begins with, within one process.
type content struct {
	sum          uint64 // see [kit.Sum]
	free, inodes uint64 // of the file system
	retry        string // what is extracted again
	tag          string // of the examiner
}

// contents has what was observed, by what it began with. It may be used from several
// goroutines.
type contents struct {
	mu   sync.Mutex
	seen map[content]*oracle.Observation
}

func (c *contents) get(of content) *oracle.Observation {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seen[of]
}

func (c *contents) put(of content, seen *oracle.Observation) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.seen == nil {
		c.seen = map[content]*oracle.Observation{}
	}
	c.seen[of] = seen
}

// content reads the whole disk, which is mounted, and leaves every time as it is.
func (w *worker) content(tag string, retry []string) (c content, err error) {
	times := func(attr uint64) error {
		return unix.MountSetattr(unix.AT_FDCWD, w.mountpoint, 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR__ATIME, Attr_set: attr})
	}
	if err := times(unix.MOUNT_ATTR_NOATIME); err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, times(unix.MOUNT_ATTR_RELATIME)) }()
	var st unix.Statfs_t
	if err := unix.Statfs(w.mountpoint, &st); err != nil {
		return c, err
	}
	slices.Sort(retry)
	c = content{free: st.Bfree, inodes: st.Ffree, retry: strings.Join(slices.Compact(retry), "\n"), tag: tag}
	c.sum, err = kit.Sum(w.mountpoint)
	return c, err
}

// observe examines the disk, which is mounted, unless one with the same content was: same. What cannot
// be read is examined.
func (w *worker) observe(ctx context.Context, examiner oracle.Examiner, root string, extent oracle.Extent) (seen *oracle.Observation, same bool) {
	c, err := w.content(examiner.Tag, extent.Retry)
	if err == nil {
		if seen := w.known.get(c); seen != nil {
			return seen, true
		}
	}
	now := examiner.Examine(ctx, root, extent)
	if err == nil {
		w.known.put(c, &now)
	}
	return &now, false
}

package seal

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
)

// Summary is what a walk counts.
type Summary struct {
	Inodes  int64
	Blocks  int64  // disk space in bytes, hardlinks once
	Entries int64  // names, the root included
	Bytes   int64  // sizes of regular files, hardlinks once
	Digest  string // of the seal's text, "sha256:…"
}

// Write walks the tree below root and writes its seal to path. It does not change the
// tree. The file is not synced.
func Write(ctx context.Context, root, path string) (Summary, error) {
	return write(ctx, root, path, nil, nil, nil)
}

// ChangeAndWrite is Write, but calls change for every entry first: what is counted and
// sealed is the entry as change leaves it. After an error the tree may be changed in
// part, and there is no seal of it. files, which may be nil, get the file. visit, which may be
// nil, is called for each entry as it is sealed, in order.
func ChangeAndWrite(ctx context.Context, root, path string, change Change, files *fsync.Files, visit func(*Entry) error) (Summary, error) {
	return write(ctx, root, path, change, files, visit)
}

func write(ctx context.Context, root, path string, change Change, files *fsync.Files, visit func(*Entry) error) (_ Summary, err error) {
	out, err := mtree.Create(path, files)
	if err != nil {
		return Summary{}, err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	c := counter{seen: map[inode]struct{}{}}
	if err := walk(ctx, root, change, func(entries []Entry, lines []byte) error {
		for i := range entries {
			c.count(&entries[i])
			if visit != nil {
				if err := visit(&entries[i]); err != nil {
					return err
				}
			}
		}
		_, err := out.Write(lines)
		return err
	}); err != nil {
		return Summary{}, err
	}
	c.Digest = out.Digest()
	return c.Summary, nil
}

type inode struct{ dev, ino uint64 }

type counter struct {
	Summary
	seen map[inode]struct{} // of what has several names
}

func (c *counter) count(e *Entry) {
	c.Entries++
	st := &e.Stat
	if st.Nlink > 1 && e.Type() != unix.S_IFDIR {
		id := inode{st.Dev, st.Ino}
		if _, again := c.seen[id]; again {
			return
		}
		c.seen[id] = struct{}{}
	}
	c.Inodes++
	// st_blocks counts 512 byte units, whatever the block size (stat(2)).
	c.Blocks += st.Blocks * 512
	if e.Type() == unix.S_IFREG {
		c.Bytes += st.Size
	}
}

package seal

import (
	"bufio"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// header is the first line of a seal.
const header = "#mtree v2.0\n"

// Summary is what a walk counts.
type Summary struct {
	Inodes  int64
	Blocks  int64  // disk space in bytes, hardlinks once
	Entries int64  // names, the root included
	Bytes   int64  // sizes of regular files, hardlinks once
	Digest  string // of the seal's text, "sha256:…"
}

// Write walks the tree below root and writes its seal to path. The file is not
// synced.
func Write(ctx context.Context, root, path string, hook Hook) (_ Summary, err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return Summary{}, err
	}
	buffered := bufio.NewWriterSize(f, 64<<10)
	// The fastest level: a Commit waits for it.
	packed, _ := gzip.NewWriterLevel(buffered, gzip.BestSpeed) // fails for unknown levels only
	defer func() {
		if err == nil {
			err = errors.Join(packed.Close(), buffered.Flush())
		}
		err = errors.Join(err, f.Close())
	}()
	c := counter{hash: sha256.New(), seen: map[inode]struct{}{}}
	out := io.MultiWriter(packed, c.hash)
	if _, err := io.WriteString(out, header); err != nil {
		return Summary{}, err
	}
	if err := Walk(ctx, root, hook, func(entries []Entry, lines []byte) error {
		for i := range entries {
			c.count(&entries[i])
		}
		_, err := out.Write(lines)
		return err
	}); err != nil {
		return Summary{}, err
	}
	c.Digest = "sha256:" + hex.EncodeToString(c.hash.Sum(nil))
	return c.Summary, nil
}

type inode struct{ dev, ino uint64 }

type counter struct {
	Summary
	hash hash.Hash
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

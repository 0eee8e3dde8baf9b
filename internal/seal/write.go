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
	out, err := create(path)
	if err != nil {
		return Summary{}, err
	}
	defer func() { err = errors.Join(err, out.close()) }()
	c := counter{seen: map[inode]struct{}{}}
	if err := Walk(ctx, root, hook, func(entries []Entry, lines []byte) error {
		for i := range entries {
			c.count(&entries[i])
		}
		_, err := out.Write(lines)
		return err
	}); err != nil {
		return Summary{}, err
	}
	c.Digest = out.digest()
	return c.Summary, nil
}

// writer is a seal that is being written.
type writer struct {
	io.Writer
	file     *os.File
	buffered *bufio.Writer
	packed   *gzip.Writer
	hash     hash.Hash
}

func create(path string) (*writer, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	w := &writer{file: f, buffered: bufio.NewWriterSize(f, 64<<10), hash: sha256.New()}
	// The fastest level: a Commit waits for it.
	w.packed, _ = gzip.NewWriterLevel(w.buffered, gzip.BestSpeed) // fails for unknown levels only
	w.Writer = io.MultiWriter(w.packed, w.hash)
	if _, err := io.WriteString(w, header); err != nil {
		return nil, errors.Join(err, w.close())
	}
	return w, nil
}

func (w *writer) close() error {
	return errors.Join(w.packed.Close(), w.buffered.Flush(), w.file.Close())
}

// digest is that of what was written so far.
func (w *writer) digest() string { return "sha256:" + hex.EncodeToString(w.hash.Sum(nil)) }

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

package fsync

import (
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
)

// ErrClosed is returned by Sync of a Cursor that was closed.
var ErrClosed = errors.New("cursor is closed")

// Cursor is a descriptor on a file system that remembers, in the kernel, up to
// which writeback error its owner has been told (errseq_t, taken from the
// superblock when the descriptor is opened: fs/open.c, do_dentry_open).
type Cursor struct {
	mu  sync.Mutex // guards f and err, and keeps two Syncs from sharing one report
	f   *os.File
	err error // the first error of Sync; every later Sync returns it again
}

// OpenCursor opens a cursor on the file system that holds the directory dir.
// Open it before the first write whose loss it must report: it knows nothing
// of earlier errors.
func OpenCursor(dir string) (*Cursor, error) {
	// O_DIRECTORY and O_NOFOLLOW: dir is a directory that the program has just
	// made; anything else in its place is not ours to sync.
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	return &Cursor{f: os.NewFile(uintptr(fd), dir)}, nil
}

// Sync makes everything that was written to the file system before the call
// durable. An error is an [Error] and final: it is returned again by every later call, because
// the kernel would answer the next syncfs with success although the pages are
// lost.
func (c *Cursor) Sync() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.f == nil {
		return ErrClosed
	}
	if c.err != nil && !faults.Mutant("retry-after-eio") {
		return c.err
	}
	if err := unix.Syncfs(int(c.f.Fd())); err != nil {
		c.err = &Error{Op: "syncfs", Path: c.f.Name(), Err: err}
		if faults.Mutant("retry-after-eio") && unix.Syncfs(int(c.f.Fd())) == nil {
			return nil
		}
	}
	return c.err
}

// Close releases the descriptor. Closing twice is harmless.
func (c *Cursor) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.f == nil {
		return nil
	}
	err := c.f.Close()
	c.f = nil
	return err
}

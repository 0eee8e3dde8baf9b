package fsync

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// ErrClosed is returned by Sync of a Cursor that was closed.
var ErrClosed = errors.New("cursor is closed")

// Cursor is a descriptor on a file system. The kernel records which writeback errors
// have been reported to it (errseq_t, taken from the superblock when the descriptor is
// opened: fs/open.c, do_dentry_open).
type Cursor struct {
	mu     sync.Mutex // guards f and err, and keeps two Syncs from sharing one report
	f      *os.File
	err    error // the first error of Sync; every later Sync returns it again
	closed atomic.Bool
}

// OpenCursor opens a cursor on the file system that holds the directory dir.
// Open it before the first write whose loss it must report: earlier errors are not
// reported to it.
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
// durable. An error is an [Error] and final: it is returned again by every later call,
// because the next syncfs would succeed although the pages are lost.
func (c *Cursor) Sync() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.closeIfAsked()
	if c.f == nil || c.closed.Load() {
		return ErrClosed
	}
	if c.err != nil {
		return c.err
	}
	if err := unix.Syncfs(int(c.f.Fd())); err != nil {
		c.err = &Error{Op: "syncfs", Path: c.f.Name(), Err: err}
	}
	return c.err
}

// Close releases the descriptor. Closing twice is harmless. It does not wait for
// a Sync in flight, which can last as long as the disk is slow: the descriptor is
// then released when that Sync ends, and Close returns nil.
func (c *Cursor) Close() error {
	c.closed.Store(true)
	if !c.mu.TryLock() {
		return nil
	}
	defer c.mu.Unlock()
	return c.release()
}

// closeIfAsked releases the descriptor after a Close during a Sync. mu must be held.
func (c *Cursor) closeIfAsked() {
	if c.closed.Load() {
		_ = c.release() // a read-only descriptor has nothing to lose
	}
}

func (c *Cursor) release() error {
	if c.f == nil {
		return nil
	}
	err := c.f.Close()
	c.f = nil
	return err
}

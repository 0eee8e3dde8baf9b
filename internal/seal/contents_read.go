package seal

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/idle"
)

// Reading is how content is read.
type Reading struct {
	Idle bool  // at idle I/O priority, on a thread of its own
	Rate int64 // bytes of content per second at most; 0: no limit
	// Direct reads from the disk and neither looks at the page cache nor fills
	// it: a file that is in use has its content there, whatever the disk holds
	// by now. File systems that cannot do so are read the usual way.
	Direct bool
	// Progress is told how many bytes of content were dealt with since it was
	// told before.
	Progress func(bytes int64)
}

func (how Reading) run(fn func() error) error {
	if how.Idle {
		return idle.Run(fn)
	}
	return fn()
}

// contentReader reads regular files below a directory.
type contentReader struct {
	how   Reading
	limit *idle.Limit
	path  string
	root  int
	buf   []byte
}

const (
	chunk = 1 << 20
	// What O_DIRECT wants of memory: a page is enough for every disk.
	alignment = 4096
)

func newContentReader(root string, how Reading) (*contentReader, error) {
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: root, Err: err}
	}
	r := &contentReader{how: how, limit: idle.NewLimit(how.Rate), path: root, root: fd}
	buf := make([]byte, chunk+alignment)
	skip := -uintptr(unsafe.Pointer(&buf[0])) % alignment
	r.buf = buf[skip : skip+chunk]
	return r, nil
}

func (r *contentReader) close() { _ = unix.Close(r.root) } // only looked at

// spend waits until n more bytes of content may be read.
func (r *contentReader) spend(ctx context.Context, n int) error {
	if err := r.limit.Wait(ctx, n); err != nil {
		return err
	}
	if r.how.Progress != nil {
		r.how.Progress(int64(n))
	}
	return nil
}

func (r *contentReader) at(rel string, flags uint64) (int, error) {
	for {
		fd, err := unix.Openat2(r.root, rel, &unix.OpenHow{
			Flags:   flags | unix.O_NOFOLLOW | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
		})
		// EAGAIN: something was renamed meanwhile (openat2(2)).
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return fd, err
		}
	}
}

func (r *contentReader) pathError(op, rel string, err error) error {
	return &os.PathError{Op: op, Path: filepath.Join(r.path, rel), Err: err}
}

// content is a regular file that is open.
type content struct {
	r   *contentReader
	rel string
	fd  int
	st  unix.Stat_t
	off int64
}

// notRegular says that a path is not that of a regular file, and what it is.
type notRegular struct{ kind string }

func (e *notRegular) Error() string { return "is a " + e.kind }

// open opens a regular file, and nothing else: to open a device may do
// something. No link is followed on the way. The time of access stays as it is.
func (r *contentReader) open(rel string) (*content, error) {
	c := &content{r: r, rel: rel}
	look, err := r.at(rel, unix.O_PATH)
	if err != nil {
		return nil, r.pathError("open", rel, err)
	}
	err = unix.Fstat(look, &c.st)
	_ = unix.Close(look)
	if err != nil {
		return nil, r.pathError("stat", rel, err)
	}
	if kind := c.st.Mode & unix.S_IFMT; kind != unix.S_IFREG {
		return nil, r.pathError("open", rel, &notRegular{typeNames[kind]})
	}
	flags := uint64(unix.O_RDONLY | unix.O_NOATIME)
	if r.how.Direct {
		flags |= unix.O_DIRECT
	}
	c.fd, err = r.at(rel, flags)
	if errors.Is(err, unix.EINVAL) { // not on this file system
		flags &^= unix.O_DIRECT
		c.fd, err = r.at(rel, flags)
	}
	if errors.Is(err, unix.EPERM) { // somebody else's, in a user namespace
		flags &^= unix.O_NOATIME
		c.fd, err = r.at(rel, flags)
	}
	if err != nil {
		return nil, r.pathError("open", rel, err)
	}
	return c, nil
}

func (c *content) close() { _ = unix.Close(c.fd) } // only read from

// next returns the next bytes of the file, valid until the next call, and io.EOF
// at its end.
func (c *content) next(ctx context.Context) ([]byte, error) {
	left := c.st.Size - c.off
	if left <= 0 {
		return nil, io.EOF
	}
	if err := c.r.spend(ctx, int(min(left, chunk))); err != nil {
		return nil, err
	}
	// No more than there is, but whole blocks, as O_DIRECT wants it.
	buf := c.r.buf[:min(chunk, (left+alignment-1)&^(alignment-1))]
	n, err := unix.Pread(c.fd, buf, c.off)
	if errors.Is(err, unix.EINVAL) && c.r.how.Direct {
		// The offset, after a short read, or the file system is particular.
		if _, err = unix.FcntlInt(uintptr(c.fd), unix.F_SETFL, 0); err == nil {
			n, err = unix.Pread(c.fd, buf, c.off)
		}
	}
	if err == nil && n == 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, c.r.pathError("read", c.rel, err)
	}
	c.off += int64(n)
	return buf[:n], nil
}

// digest reads the file from its beginning and returns the SHA-256 of all of it
// as mtree writes it.
func (c *content) digest(ctx context.Context) (string, error) {
	hash := sha256.New()
	c.off = 0
	for {
		b, err := c.next(ctx)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return "", err
		}
		hash.Write(b)
	}
	if c.off != c.st.Size {
		return "", fmt.Errorf("%s changed while it was read", filepath.Join(c.r.path, c.rel))
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

// absent reports an error that means: there is no regular file of this path.
func absent(err error) bool {
	var other *notRegular
	return errors.As(err, &other) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

// Unreadable reports an error that means: the disk, or the file system on it,
// does not give back what was written. Other errors say nothing of a file.
func Unreadable(err error) bool {
	for _, lost := range []error{
		unix.EIO,
		unix.ENODATA, // critical medium error, of the block layer
		unix.EUCLEAN, // EFSCORRUPTED of the file systems
		unix.EBADMSG, // EFSBADCRC
	} {
		if errors.Is(err, lost) {
			return true
		}
	}
	return false
}

// unreadable is the finding of a file that cannot be read.
func unreadable(path string, err error) *Finding {
	var errno unix.Errno
	errors.As(err, &errno) // see Unreadable
	return &Finding{Path: path, What: "unreadable", Have: errno.Error()}
}

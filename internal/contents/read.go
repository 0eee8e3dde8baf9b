package contents

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/idle"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
)

// Reading is how content is read.
type Reading struct {
	Idle bool  // at idle I/O priority, on a thread of its own
	Rate int64 // bytes of content per second at most; 0: no limit
	// Direct reads from the disk and neither uses the page cache nor fills
	// it: a file that is in use has its content there, whatever the disk holds
	// by now. File systems that cannot do so are read the usual way.
	Direct bool
	// Progress is called with the number of bytes of content that were processed since
	// its last call, holes included. Rate counts only what is read.
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

// newContentReader fails with tree.ErrMounted when root is a mount point.
func newContentReader(root string, how Reading) (*contentReader, error) {
	t, err := tree.Open(root)
	if err != nil {
		return nil, err
	}
	t.Close()
	fd, err := tree.Retry(func() (int, error) {
		return unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: root, Err: err}
	}
	if err := t.CheckOpen(fd, root); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	r := &contentReader{how: how, limit: idle.NewLimit(how.Rate), path: root, root: fd}
	r.buf = *buffers.Get().(*[]byte)
	return r, nil
}

// buffers has what a reader reads into: most layers are smaller than a new one.
var buffers = sync.Pool{New: func() any {
	buf := make([]byte, chunk+alignment)
	skip := -uintptr(unsafe.Pointer(&buf[0])) % alignment
	buf = buf[skip : skip+chunk]
	return &buf
}}

func (r *contentReader) close() {
	buffers.Put(&r.buf)
	_ = unix.Close(r.root) // nothing was written
}

// spend waits until n more bytes of content may be read.
func (r *contentReader) spend(ctx context.Context, n int) error {
	if err := r.limit.Wait(ctx, n); err != nil {
		return err
	}
	r.progress(int64(n))
	return nil
}

func (r *contentReader) progress(n int64) {
	if r.how.Progress != nil {
		r.how.Progress(n)
	}
}

func (r *contentReader) pathError(op, rel string, err error) error {
	path := filepath.Join(r.path, rel)
	if errors.Is(err, tree.ErrMounted) {
		for at := path; len(at) > len(r.path); at = filepath.Dir(at) {
			if tree.IsMountPoint(at) {
				path = at
			}
		}
		return tree.MountedAt(path)
	}
	if tree.Unreadable(err) {
		err = tree.Evidence(err, filepath.Dir(r.path))
	}
	return &os.PathError{Op: op, Path: path, Err: err}
}

// content is a regular file that is open.
type content struct {
	r    *contentReader
	rel  string
	fd   int
	st   unix.Stat_t
	off  int64
	data int64 // end of the data at off, when off is not in a hole
	full bool  // it is known to have no holes, or the file system cannot find them
}

// notRegular is the error of a path that is not that of a regular file.
type notRegular struct{ kind string }

func (e *notRegular) Error() string { return "is a " + e.kind }

// open opens a regular file, and nothing else: to open a device may do
// something. No link is followed on the way. The time of access stays as it is.
func (r *contentReader) open(rel string) (*content, error) {
	c := &content{r: r, rel: rel}
	probe, err := tree.OpenAt(r.root, rel, unix.O_PATH)
	if err != nil {
		return nil, r.pathError("open", rel, err)
	}
	err = unix.Fstat(probe, &c.st)
	_ = unix.Close(probe)
	if err != nil {
		return nil, r.pathError("stat", rel, err)
	}
	if kind := c.st.Mode & unix.S_IFMT; kind != unix.S_IFREG {
		return nil, r.pathError("open", rel, &notRegular{mtree.TypeName(kind)})
	}
	flags := uint64(unix.O_RDONLY | unix.O_NOATIME)
	if r.how.Direct {
		flags |= unix.O_DIRECT
	}
	c.fd, err = tree.OpenAt(r.root, rel, flags)
	if errors.Is(err, unix.EINVAL) { // not on this file system
		flags &^= unix.O_DIRECT
		c.fd, err = tree.OpenAt(r.root, rel, flags)
	}
	if errors.Is(err, unix.EPERM) { // another owner's, in a user namespace
		flags &^= unix.O_NOATIME
		c.fd, err = tree.OpenAt(r.root, rel, flags)
	}
	if err != nil {
		return nil, r.pathError("open", rel, err)
	}
	// In units of 512 bytes, whatever the block size (stat(2)).
	c.full = c.st.Blocks*512 >= c.st.Size
	return c, nil
}

func (c *content) close() { _ = unix.Close(c.fd) } // only read from

// hole returns how many bytes from here on are in a hole, 0 for none. Unwritten
// extents are holes too: they read as zeros.
func (c *content) hole() (int64, error) {
	if c.full || c.off < c.data || c.off >= c.st.Size {
		return 0, nil
	}
	start, err := c.seek(c.off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // no more data
		start = c.st.Size
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		c.full = true
		return 0, nil
	case err != nil:
		return 0, c.r.pathError("seek", c.rel, err)
	}
	if start < c.st.Size {
		// As O_DIRECT wants it; what is before the data are zeros, read or not.
		start = max(start&^(alignment-1), c.off)
	}
	if n := min(start, c.st.Size) - c.off; n > 0 {
		return n, nil
	}
	end, err := c.seek(c.off, unix.SEEK_HOLE)
	if err != nil && !errors.Is(err, unix.ENXIO) {
		return 0, c.r.pathError("seek", c.rel, err)
	}
	// Whole blocks, so that the next offset is aligned. A block at least: the
	// data may begin behind c.off.
	c.data = max((end+alignment-1)&^(alignment-1), c.off+alignment)
	return 0, nil
}

func (c *content) seek(off int64, whence int) (int64, error) {
	for {
		n, err := unix.Seek(c.fd, off, whence)
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// holes returns how many bytes of the file are in holes, and goes back to its
// beginning.
func (c *content) holes(ctx context.Context) (sum int64, err error) {
	for c.off = 0; !c.full && c.off < c.st.Size; {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		n, err := c.hole()
		if err != nil {
			return 0, err
		}
		if n == 0 {
			n = c.data - c.off
		} else {
			sum += n
		}
		c.off += n
	}
	c.off, c.data = 0, 0
	return sum, nil
}

// next returns the next bytes of the file, valid until the next call, or how
// many zeros of a hole come next, at most limit, and io.EOF at its end.
func (c *content) next(ctx context.Context, limit int64) (data []byte, zeros int64, err error) {
	left := min(c.st.Size-c.off, limit)
	if c.st.Size <= c.off {
		return nil, 0, io.EOF
	}
	if zeros, err = c.hole(); err != nil {
		return nil, 0, err
	}
	if zeros > 0 {
		zeros = min(zeros, limit)
		c.off += zeros
		c.r.progress(zeros)
		return nil, zeros, nil
	}
	if !c.full {
		left = min(left, c.data-c.off)
	}
	if err := c.r.spend(ctx, int(min(left, chunk))); err != nil {
		return nil, 0, err
	}
	// No more than there is, but whole blocks, as O_DIRECT wants it.
	buf := c.r.buf[:min(chunk, (left+alignment-1)&^(alignment-1))]
	n, err := unix.Pread(c.fd, buf, c.off)
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Pread(c.fd, buf, c.off)
	}
	if errors.Is(err, unix.EINVAL) && c.r.how.Direct {
		// The offset, after a short read, or the file system is particular.
		if _, err = unix.FcntlInt(uintptr(c.fd), unix.F_SETFL, 0); err == nil {
			n, err = unix.Pread(c.fd, buf, c.off)
		}
	}
	if err == nil && n == 0 {
		return nil, 0, fmt.Errorf("%s became shorter while it was read", filepath.Join(c.r.path, c.rel))
	}
	if err != nil {
		return nil, 0, c.r.pathError("read", c.rel, err)
	}
	n = int(min(int64(n), left))
	c.off += int64(n)
	return buf[:n], 0, nil
}

// digest reads the file from its beginning and returns its digest in hex: the
// SHA-256 of all of it, as mtree writes it, or that of a sparse file.
func (c *content) digest(ctx context.Context, sparse bool) (string, error) {
	h := newContentHash(sparse)
	c.off, c.data = 0, 0
	for {
		b, zeros, err := c.next(ctx, math.MaxInt64)
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			h.write(b)
			err = h.zeros(ctx, zeros)
		}
		if err != nil {
			return "", err
		}
	}
	return h.hex(), nil
}

// absent reports an error that means: there is no regular file of this path.
// ELOOP is of openat2(2): a symbolic link is on the path.
func absent(err error) bool {
	var other *notRegular
	return errors.As(err, &other) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

// Package inflate decompresses blobs of layers: gzip, zstd, or neither, found out from
// the first bytes as containerd does.
//
//	Stream  in this process, from anything
//	File    from a file, gzip by igzip(1) where the caller wants that
//
// igzip, of the package isal, is as fast as [gunzip], and another process. It gets the
// blob's own descriptor and a pipe of a mebibyte, so that the bytes are copied once. It is no
// witness: a child that fails has proven nothing about the blob, and nothing goes on
// from the middle of a stream with another program ([ErrChild]).
//
// A decompressor of zstd takes as much memory as the stream asks for, at most 512 MiB
// as with containerd, and usually 8; one of gzip takes 360 KiB.
package inflate

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"sync"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/gunzip"
)

// headSize is how many bytes decide about the compression.
const headSize = 10

// Stream decompresses a stream in this process. Close does not close src.
func Stream(src io.Reader) (io.ReadCloser, error) {
	buf := bufio.NewReaderSize(src, 64<<10)
	head, err := buf.Peek(headSize)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch compression.DetectCompression(head) {
	case compression.Gzip:
		return gunzip.NewReader(buf)
	case compression.Zstd:
		// One goroutine, the caller's: it is faster than two, and leaves the other
		// processors to those who write.
		d, err := zstd.NewReader(buf, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(false))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return io.NopCloser(buf), nil
}

// Igzip returns the path of igzip, "" when it is not installed or containerd's environment
// variable CONTAINERD_DISABLE_IGZIP is true.
func Igzip() string {
	if off, err := strconv.ParseBool(os.Getenv("CONTAINERD_DISABLE_IGZIP")); err == nil && off {
		return ""
	}
	path, err := exec.LookPath("igzip")
	if err != nil {
		return ""
	}
	return path
}

// ErrChild is wrapped by the error of a decompressor that is another process. It is no
// evidence about the blob.
var ErrChild = errors.New("the decompressor has failed")

// File decompresses a blob from the beginning of a file, whose offset it moves. igzip is the
// path of the program for gzip, "" for Stream. A child ends with ctx, or with Close. Close
// does not close the file.
func File(ctx context.Context, blob *os.File, igzip string) (io.ReadCloser, error) {
	head := make([]byte, headSize)
	n, err := blob.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	if _, err := blob.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	if igzip == "" || compression.DetectCompression(head[:n]) != compression.Gzip {
		return Stream(blob)
	}
	return start(ctx, blob, igzip)
}

// Program is which program decompresses a stream of File or Stream: igzip, or internal for
// this process.
func Program(tar io.ReadCloser) string {
	if _, ok := tar.(*child); ok {
		return "igzip"
	}
	return "internal"
}

// child is a running decompressor.
type child struct {
	ctx    context.Context
	cmd    *exec.Cmd
	out    *os.File
	stderr bytes.Buffer
	wait   func() error // once
}

// pipeSize is the most that an unprivileged process gets (pipe-max-size, proc(5)).
const pipeSize = 1 << 20

func start(ctx context.Context, blob *os.File, program string) (*child, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close() // the child has its own
	if raw, err := w.SyscallConn(); err == nil {
		// Not to be had when the user's pipes take too much already (pipe(7)): then it is slower.
		_ = raw.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize) })
	}
	c := &child{ctx: ctx, out: r}
	c.cmd = exec.CommandContext(ctx, program, "-d", "-c")
	c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = blob, w, &c.stderr
	if err := c.cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", ErrChild, err), r.Close())
	}
	c.wait = sync.OnceValue(c.cmd.Wait)
	return c, nil
}

// Read ends with io.EOF only when the child has ended without an error: a pipe ends with
// its writer, however that ends.
func (c *child) Read(p []byte) (int, error) {
	n, err := c.out.Read(p)
	if err != io.EOF {
		return n, err
	}
	if err := c.wait(); err != nil {
		if c.ctx.Err() != nil {
			return n, c.ctx.Err()
		}
		return n, fmt.Errorf("%w: %s: %w: %s", ErrChild, c.cmd.Path, err, bytes.TrimSpace(c.stderr.Bytes()))
	}
	return n, io.EOF
}

// Close ends the child.
func (c *child) Close() error {
	_ = c.cmd.Process.Kill() // or it has ended
	_ = c.wait()
	return c.out.Close()
}

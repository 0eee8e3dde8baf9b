package mtree

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
)

// ErrUnsealed is wrapped by every error that means: the file is missing, cannot be
// read, or is not the one that was written.
var ErrUnsealed = errors.New("no valid seal")

// ErrTooLarge is wrapped by errors about an entry with more extended attributes
// than seal.MaxEntry, or than the kernel can list (64 KiB of names, xattr(7)). The
// error names the entry and the limit.
var ErrTooLarge = errors.New("too many extended attributes for an entry of a layer")

// Reader reads a text line by line, and buffers one line.
type Reader struct {
	path string
	file *os.File
	bufs *readBuffers
	text *bufio.Scanner
	rest io.Reader // what text reads from
	hash hash.Hash
	line []byte // the next line, without its line break
	have bool   // line is valid
	err  error  // why there are no more lines, nil at the end
	long bool   // it is a line of more than MaxLine bytes
}

// readBuffers are the memory that reading a text takes, 170 KiB. They are used again: the
// Commit of a layer reads the seals of all layers below it.
type readBuffers struct {
	file   *bufio.Reader
	packed gzip.Reader
	line   []byte
}

var readPool = sync.Pool{New: func() any {
	return &readBuffers{file: bufio.NewReaderSize(nil, 64<<10), line: make([]byte, 64<<10)}
}}

// Open opens a text and reads its header. The caller closes the Reader. The error wraps
// ErrUnsealed only when it proves something about the file: that it is missing, that the
// disk cannot read it, or that it has no such text. That the process has no descriptors
// or memory left, or no permission to read the file, proves nothing about it.
func Open(path string) (*Reader, error) {
	fd, err := tree.Retry(func() (int, error) {
		// Not to wait for the writer of a pipe.
		return unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, unsealed(path, &os.PathError{Op: "open", Path: path, Err: err})
	}
	f := os.NewFile(uintptr(fd), path)
	r := &Reader{path: path, file: f, hash: sha256.New()}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, errors.Join(unsealed(path, &os.PathError{Op: "stat", Path: path, Err: err}), f.Close())
	}
	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFREG {
		return nil, errors.Join(fmt.Errorf("%w: %s is a %s", ErrUnsealed, path, TypeName(kind)), f.Close())
	}
	r.bufs = readPool.Get().(*readBuffers)
	r.bufs.file.Reset(f)
	if err = r.bufs.packed.Reset(r.bufs.file); err == nil {
		r.rest = io.TeeReader(&r.bufs.packed, r.hash)
		r.text = bufio.NewScanner(r.rest)
		r.text.Buffer(r.bufs.line, MaxLine)
		r.text.Split(splitLine)
		if !r.Next() || string(r.line)+"\n" != header {
			if err = r.err; err == nil {
				err = errors.New("no mtree header")
			}
		}
		r.Take()
	}
	if err != nil {
		err = unsealed(path, err)
		r.Close()
		return nil, err
	}
	return r, nil
}

// unsealed classifies an error of a text's file. Errors of its content come from the
// decompression and the parsing, those of access to it from the system.
func unsealed(path string, err error) error {
	var errno unix.Errno
	switch {
	case errors.Is(err, ErrUnsealed):
		return err
	case !errors.As(err, &errno):
		return fmt.Errorf("%w: %s: %w", ErrUnsealed, path, err)
	case tree.Missing(err):
		// Covered by a mount is not missing.
		if dir := filepath.Dir(path); tree.IsMountPoint(dir) {
			return tree.MountedAt(dir)
		}
		return fmt.Errorf("%w: %w", ErrUnsealed, err)
	case tree.Unreadable(err):
		if err := tree.Evidence(err, filepath.Dir(path)); !tree.Unreadable(err) {
			return err
		}
		return fmt.Errorf("%w: %w", ErrUnsealed, err)
	}
	return fmt.Errorf("read the seal: %w", err)
}

// Close ends the use of the Reader and of its lines.
func (r *Reader) Close() {
	_ = r.file.Close() // only read from
	r.bufs.file.Reset(nil)
	readPool.Put(r.bufs)
	r.bufs, r.text, r.rest, r.line = nil, nil, nil, nil
}

// Next reads the next line for Line, unless it was read already and not taken. It is
// false at the end, and at an error: see Err.
func (r *Reader) Next() bool {
	if r.have || r.err != nil {
		return r.have
	}
	if r.text.Scan() {
		r.line, r.have = r.text.Bytes(), true
		return true
	}
	if err := r.text.Err(); err != nil {
		if r.err = unsealed(r.path, err); errors.Is(err, bufio.ErrTooLong) {
			r.long = true
		}
	}
	return false
}

// MaxLine is the most bytes that a line may have. Lines of new seals are shorter,
// see seal.MaxEntry; older seals have every attribute in full.
const MaxLine = 16 << 20

// splitLine is bufio.ScanLines, but a line must have its line break.
func splitLine(data []byte, atEOF bool) (advance int, token []byte, err error) {
	if i := bytes.IndexByte(data, '\n'); i >= 0 {
		return i + 1, data[:i], nil
	}
	if atEOF && len(data) > 0 {
		return 0, nil, errors.New("cut short")
	}
	return 0, nil, nil
}

// Line is the next line, without its line break. It is valid after Next has returned true,
// until the call of Next that follows Take.
func (r *Reader) Line() []byte { return r.line }

// Err is why Next has returned false, nil at the end of the text.
func (r *Reader) Err() error { return r.err }

// Take ends the use of the present line: Next goes on to the one after it.
func (r *Reader) Take() { r.have = false }

// Check reads the rest and compares the digest of the whole text. The error wraps
// ErrUnsealed when the text is another one, and ErrTooLarge when it is the right one but
// has a line of more than MaxLine bytes.
func (r *Reader) Check(digest string) error {
	if r.err != nil && !r.long {
		return r.err
	}
	if _, err := io.Copy(io.Discard, r.rest); err != nil {
		return unsealed(r.path, err)
	}
	if got := r.Digest(); got != digest {
		return fmt.Errorf("%w: %s: its digest is %s, and was %s", ErrUnsealed, r.path, got, digest)
	}
	if r.long {
		// It is what was written, by a version that wrote more than it read.
		return fmt.Errorf("%s: %w: a line of more than %d bytes cannot be compared; remove the layer and extract it again", r.path, ErrTooLarge, MaxLine)
	}
	return nil
}

// Digest is that of the text read so far.
func (r *Reader) Digest() string { return "sha256:" + hex.EncodeToString(r.hash.Sum(nil)) }

// TextDigest returns the digest of the text in a file, "sha256:…". ErrUnsealed means that the
// file is missing or unreadable, or holds no such text: a header, then whole
// lines in the order of a walk. Any other error proves nothing about the file.
func TextDigest(path string) (string, error) {
	r, err := Open(path)
	if err != nil {
		return "", err
	}
	defer r.Close()
	last := ""
	for n := 0; r.Next(); n++ {
		name, err := PathOf(r.line)
		if err == nil && n > 0 && ComparePaths(last, name) >= 0 {
			err = fmt.Errorf("%w: %s: %q does not come after %q", ErrUnsealed, path, name, last)
		}
		if err != nil {
			return "", err
		}
		last = name
		r.Take()
	}
	if r.err != nil {
		return "", r.err
	}
	return r.Digest(), nil
}

package seal

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
)

// ErrUnsealed is wrapped by every error that means: the seal is missing, cannot
// be read, or is not the one that was written.
var ErrUnsealed = errors.New("no valid seal")

// reader reads a seal line by line, with one line of look-ahead.
type reader struct {
	path string
	file *os.File
	text *bufio.Scanner
	rest io.Reader // what text reads from
	hash hash.Hash
	line []byte // the next line, without its line break
	have bool   // line is valid
	err  error  // why there are no more lines, nil at the end
}

func open(path string) (*reader, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnsealed, err)
	}
	r := &reader{path: path, file: f, hash: sha256.New()}
	packed, err := gzip.NewReader(bufio.NewReaderSize(f, 64<<10))
	if err == nil {
		r.rest = io.TeeReader(packed, r.hash)
		r.text = bufio.NewScanner(r.rest)
		r.text.Buffer(make([]byte, 64<<10), maxLine)
		r.text.Split(splitLine)
		if !r.next() || string(r.line)+"\n" != header {
			err = errors.Join(r.err, errors.New("no mtree header"))
		}
		r.take()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %s: %w", ErrUnsealed, path, err), f.Close())
	}
	return r, nil
}

func (r *reader) close() { _ = r.file.Close() } // only read from

// next makes r.line the next line, unless it is already. It is false at the
// end.
func (r *reader) next() bool {
	if r.have || r.err != nil {
		return r.have
	}
	if r.text.Scan() {
		r.line, r.have = r.text.Bytes(), true
		return true
	}
	if err := r.text.Err(); err != nil {
		r.err = fmt.Errorf("%w: %s: %w", ErrUnsealed, r.path, err)
	}
	return false
}

// maxLine is more than a path and all extended attributes of one file take: the
// kernel lets them have 64 KiB each (xattr(7)), and few file systems more than
// that together.
const maxLine = 16 << 20

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

func (r *reader) take() { r.have = false }

// check reads the rest and compares the digest of the whole text.
func (r *reader) check(digest string) error {
	if r.err != nil {
		return r.err
	}
	if _, err := io.Copy(io.Discard, r.rest); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrUnsealed, r.path, err)
	}
	if got := "sha256:" + hex.EncodeToString(r.hash.Sum(nil)); got != digest {
		return fmt.Errorf("%w: %s: its digest is %s, and was %s", ErrUnsealed, r.path, got, digest)
	}
	return nil
}

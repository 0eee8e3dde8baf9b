package mtree

import (
	"bufio"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"os"
)

// header is the first line of a text.
const header = "#mtree v2.0\n"

// Writer writes a text. What is written to it must be whole lines.
type Writer struct {
	io.Writer
	file     *os.File
	buffered *bufio.Writer
	packed   *gzip.Writer
	hash     hash.Hash
}

// Create makes or truncates a file and writes the header. The file is not synced; the
// caller closes the Writer.
func Create(path string) (*Writer, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	w := &Writer{file: f, buffered: bufio.NewWriterSize(f, 64<<10), hash: sha256.New()}
	// The fastest level: a Commit waits for it.
	w.packed, _ = gzip.NewWriterLevel(w.buffered, gzip.BestSpeed) // fails for unknown levels only
	w.Writer = io.MultiWriter(w.packed, w.hash)
	if _, err := io.WriteString(w, header); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

// Close writes what is buffered and closes the file.
func (w *Writer) Close() error {
	return errors.Join(w.packed.Close(), w.buffered.Flush(), w.file.Close())
}

// Digest is that of the text written so far.
func (w *Writer) Digest() string { return "sha256:" + hex.EncodeToString(w.hash.Sum(nil)) }

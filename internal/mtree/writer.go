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
	"sync"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
)

// header is the first line of a text.
const header = "#mtree v2.0\n"

// Writer writes a text. What is written to it must be whole lines.
type Writer struct {
	io.Writer
	file  *os.File
	files *fsync.Files
	bufs  *writeBuffers
	hash  hash.Hash
}

// writeBuffers are the memory that writing a text takes, about 1 MiB.
type writeBuffers struct {
	file   *bufio.Writer
	packed *gzip.Writer
}

var writePool = sync.Pool{New: func() any {
	b := &writeBuffers{file: bufio.NewWriterSize(nil, 64<<10)}
	// The fastest level: a Commit waits for it.
	b.packed, _ = gzip.NewWriterLevel(nil, gzip.BestSpeed) // fails for unknown levels only
	return b
}}

// Create makes or truncates a file and writes the header. The file is not synced; files,
// which may be nil, get it when it is complete. The caller closes the Writer.
func Create(path string, files *fsync.Files) (*Writer, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	w := &Writer{file: f, files: files, bufs: writePool.Get().(*writeBuffers), hash: sha256.New()}
	w.bufs.file.Reset(f)
	w.bufs.packed.Reset(w.bufs.file)
	w.Writer = io.MultiWriter(w.bufs.packed, w.hash)
	if _, err := io.WriteString(w, header); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

// Close writes what is buffered, closes the file, and ends the use of the Writer; Digest
// stays.
func (w *Writer) Close() error {
	err := errors.Join(w.bufs.packed.Close(), w.bufs.file.Flush(), w.files.AddFile(w.file), w.file.Close())
	w.bufs.file.Reset(nil)
	writePool.Put(w.bufs)
	w.bufs, w.Writer = nil, nil
	return err
}

// Digest is that of the text written so far.
func (w *Writer) Digest() string { return "sha256:" + hex.EncodeToString(w.hash.Sum(nil)) }

package treetest

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
)

// Text returns the text of a compressed file, such as a seal.
func Text(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	Check(t, err)
	defer f.Close()
	r, err := gzip.NewReader(f)
	Check(t, err)
	b, err := io.ReadAll(r)
	Check(t, err)
	return string(b)
}

// Pack makes a seal or a list of contents out of a text.
func Pack(t testing.TB, text string) (path, digest string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "text")
	f, err := os.Create(path)
	Check(t, err)
	w := gzip.NewWriter(f)
	_, err = io.WriteString(w, text)
	Check(t, errors.Join(err, w.Close(), f.Close()))
	return path, fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(text)))
}

// Tar packs a tree with GNU tar.
func Tar(t testing.TB, root string, args ...string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "layer.tar"))
	Check(t, err)
	t.Cleanup(func() { f.Close() })
	cmd := exec.CommandContext(t.Context(), "tar", append([]string{"-C", root, "-cf", f.Name(), "."}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	return f
}

// Flip returns a copy with one bit flipped, in the byte at an index.
func Flip(b []byte, at int) []byte {
	b = bytes.Clone(b)
	b[at] ^= 1
	return b
}

// FlipIn flips a bit of a file's content.
func FlipIn(path string, at int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	b := make([]byte, 1)
	_, err = f.ReadAt(b, at)
	b[0] ^= 0x80
	if err == nil {
		_, err = f.WriteAt(b, at)
	}
	return errors.Join(err, f.Close())
}

// Join returns the texts of findings in one line.
func Join(found []finding.Finding) string {
	var all []string
	for _, f := range found {
		all = append(all, f.String())
	}
	return strings.Join(all, " ")
}

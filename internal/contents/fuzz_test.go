package contents

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive"

	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

// FuzzList: whatever lines a list with the right digest has, a verification ends with
// findings, or takes the list for none. A line without a finding is that of a file.
func FuzzList(f *testing.F) {
	root := f.TempDir()
	check(f, os.MkdirAll(root+"/dir", 0o755))
	check(f, os.WriteFile(root+"/dir/file", []byte("content"), 0o644))
	check(f, os.Link(root+"/dir/file", root+"/dir/hard"))
	check(f, os.WriteFile(root+"/sparse", nil, 0o644))
	check(f, os.Truncate(root+"/sparse", 2<<20))
	check(f, os.Symlink("dir", root+"/soft"))
	path, _ := contentsOf(f, root)
	good := text(f, path)
	f.Add(good)
	f.Add(strings.ReplaceAll(good, "./dir/file", "./soft/file"))
	f.Add(strings.ReplaceAll(good, "./dir/file", "./dir/../../x"))
	f.Fuzz(func(t *testing.T, lines string) {
		path, digest := treetest.Pack(t, lines)
		defer os.RemoveAll(filepath.Dir(path))
		found, err := Verify(t.Context(), root, path, digest, 10, Reading{})
		if err != nil && !errors.Is(err, mtree.ErrUnsealed) {
			t.Errorf("error %v", err)
		}
		if lines == good && (err != nil || len(found) > 0) {
			t.Errorf("the list of the tree: %v, %v", found, err)
		}
		if err != nil || len(found) > 0 {
			return
		}
		for line := range strings.Lines(lines[strings.Index(lines, "\n")+1:]) {
			w, err := parseContent([]byte(strings.TrimSuffix(line, "\n")))
			check(t, err)
			if st, err := os.Lstat(filepath.Join(root, w.path)); err != nil || !st.Mode().IsRegular() || st.Size() != w.size {
				t.Errorf("no finding of %q: %v", line, err)
			}
		}
	})
}

// FuzzTar: what containerd has made of a tar is found right, however odd the tar, and a tar
// that it refuses ends without a panic.
func FuzzTar(f *testing.F) {
	for _, entries := range [][]tar.Header{
		{directory("d"), regular("d/f", "body"), hardlink("h", "d/f"), symlink("s", "d"), regular("s/g", "x")},
		{regular("a", "1"), regular("./a", "2"), regular(".wh.b", ""), regular("d/.wh..wh..opq", ""), pipe("a")},
		{global(), {Typeflag: tar.TypeReg, Name: "p", Linkname: "pax", PAXRecords: map[string]string{"SCHILY.xattr.user.x": "y"}}},
	} {
		p, err := pack(entries)
		check(f, err)
		f.Add(p, true)
	}
	f.Fuzz(func(t *testing.T, layer []byte, overlay bool) {
		if !small(layer) {
			return
		}
		root := t.TempDir()
		var opts []archive.ApplyOpt
		if overlay {
			opts = converters["overlay"]
		}
		if _, err := archive.Apply(t.Context(), root, bytes.NewReader(layer), opts...); err != nil {
			_, _ = VerifyTar(t.Context(), root, bytes.NewReader(layer), 10, Reading{})
			return
		}
		found, err := VerifyTar(t.Context(), root, bytes.NewReader(layer), 10, Reading{})
		if err != nil || len(found) > 0 {
			t.Errorf("found %v, %v", found, err)
		}
	})
}

// small reports whether the files of a tar, as long as its headers have them, fit on the disk of a test.
func small(layer []byte) bool {
	const most = 1 << 20
	for tr, sum := tar.NewReader(bytes.NewReader(layer)), int64(0); ; {
		h, err := tr.Next()
		if err != nil {
			return true // containerd stops here, too
		}
		n, _ := io.Copy(io.Discard, io.LimitReader(tr, most))
		if sum += max(h.Size, n); sum > most || sum < 0 {
			return false
		}
	}
}

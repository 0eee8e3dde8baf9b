package marks

import (
	"archive/tar"
	"bytes"
	"path/filepath"
	"testing"
)

// FuzzTarDirs: whatever a tar holds, reading its directories ends, and finds those that have
// a plain name.
func FuzzTarDirs(f *testing.F) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range []string{"a/", "./a/b/", "../c/", "/d//e"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}); err != nil {
			f.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add(b.Bytes()[:700])
	root := f.TempDir()
	f.Fuzz(func(t *testing.T, layer []byte) {
		d := NewTarDirs(root)
		_ = d.Read(bytes.NewReader(layer))
		for tr := tar.NewReader(bytes.NewReader(layer)); ; {
			h, err := tr.Next()
			if err != nil {
				return
			}
			if name := filepath.Clean(h.Name); h.Typeflag == tar.TypeDir && filepath.IsLocal(name) && name != "." && !d.Has(name) {
				t.Errorf("no directory %q", name)
			}
		}
	})
}

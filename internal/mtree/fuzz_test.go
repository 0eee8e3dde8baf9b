package mtree

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

// FuzzText: a file is either refused, or is a text whose lines are in order, with the
// digest of its bytes. Names survive their encoding, and the order of lines is one.
func FuzzText(f *testing.F) {
	f.Add(true, []byte(header+". type=dir\n./a type=dir\n./a/b\\040 type=file\n./a- type=file\n"))
	f.Add(true, []byte(header+"./\\777 x\n"))
	f.Add(true, []byte(header+"."))
	packed, _ := treetest.Pack(f, header+". type=dir\n")
	b, err := os.ReadFile(packed)
	treetest.Check(f, err)
	f.Add(false, b)
	path := filepath.Join(f.TempDir(), "raw")
	f.Fuzz(func(t *testing.T, pack bool, text []byte) {
		file := path
		if pack {
			file, _ = treetest.Pack(t, string(text))
		} else {
			treetest.Check(t, os.WriteFile(path, text, 0o600))
		}
		digest, err := TextDigest(file)
		if err != nil && !errors.Is(err, ErrUnsealed) {
			t.Errorf("error %v", err)
		}
		if want := fmt.Sprintf("sha256:%x", sha256.Sum256(text)); pack && err == nil && digest != want {
			t.Errorf("digest %s, want %s", digest, want)
		}
		if back, err := Unvis(string(AppendVis(nil, string(text)))); err != nil || back != string(text) {
			t.Errorf("became %q, %v", back, err)
		}
		var names []string
		for line := range bytes.Lines(text) {
			name, err := PathOf(bytes.TrimSuffix(line, []byte("\n")))
			if err != nil || len(names) == 6 {
				continue
			}
			if again, err := PathOf(AppendPath(nil, name)); name != "" && (err != nil || again != name) {
				t.Errorf("%q became %q, %v", name, again, err)
			}
			names = append(names, name)
		}
		for _, a := range names {
			for _, b := range names {
				if sign(ComparePaths(a, b)) != -sign(ComparePaths(b, a)) || (a == b) != (ComparePaths(a, b) == 0) {
					t.Errorf("%q and %q: %d, %d", a, b, ComparePaths(a, b), ComparePaths(b, a))
				}
				for _, c := range names {
					if ComparePaths(a, b) < 0 && ComparePaths(b, c) < 0 && ComparePaths(a, c) >= 0 {
						t.Errorf("%q, %q, %q are in a circle", a, b, c)
					}
				}
			}
		}
	})
}

func sign(n int) int { return min(max(n, -1), 1) }

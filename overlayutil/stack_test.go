package overlayutil

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestStackAgreesWithTheKernel makes random layers, mounts them, and compares
// what the kernel shows with what Lookup and Top return. Every entry has a mode of
// its own, which shows where it comes from.
func TestStackAgreesWithTheKernel(t *testing.T) {
	needRoot(t)
	for _, space := range []Space{Trusted, User} {
		features, err := Probe(t.TempDir(), space)
		if err != nil {
			t.Fatal(err)
		}
		for seed := range uint64(150) {
			t.Run(fmt.Sprint(space, seed), func(t *testing.T) {
				b := layerBuilder{Rand: rand.New(rand.NewPCG(seed, 1)), space: space, xattrs: features.XattrWhiteouts}
				s := Stack{Space: space}
				for range 2 + b.IntN(4) {
					layer := t.TempDir()
					if err := b.fill(layer, 0); err != nil {
						t.Fatal(err)
					}
					s.Layers = append(s.Layers, layer)
				}
				compare(t, s)
			})
		}
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
}

type layerBuilder struct {
	*rand.Rand
	space  Space
	xattrs bool
	mode   fs.FileMode // of the last entry
}

var names = []string{"a", "b", "c"}

func (b *layerBuilder) fill(dir string, depth int) error {
	opaque, err := b.space.Get(dir, AttrOpaque)
	if err != nil {
		return err
	}
	for _, name := range names {
		path := filepath.Join(dir, name)
		b.mode++
		switch n := b.IntN(10); {
		case n < 4 && depth < 3:
			err = errors.Join(os.Mkdir(path, 0o700), os.Chmod(path, b.mode))
			switch mark := b.IntN(4); {
			case mark == 0:
				err = errors.Join(err, b.space.Set(path, AttrOpaque, Opaque))
			case mark == 1 && b.xattrs:
				err = errors.Join(err, b.space.Set(path, AttrOpaque, XattrWhiteouts))
			}
			err = errors.Join(err, b.fill(path, depth+1))
		case n == 4:
			err = MakeWhiteout(path)
		case n == 5:
			err = errors.Join(os.WriteFile(path, nil, 0o600), b.space.Set(path, AttrWhiteout, ""))
			if opaque != XattrWhiteouts {
				err = os.Remove(path)
			}
		case n == 6:
			err = errors.Join(os.WriteFile(path, []byte("x"), 0o600), os.Chmod(path, b.mode))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func compare(t *testing.T, s Stack) {
	t.Helper()
	merged := t.TempDir()
	options := Options{Lower: s.Layers}
	if s.Space == User {
		options.Rest = []string{"userxattr"}
	}
	if err := unix.Mount("overlay", merged, "overlay", unix.MS_RDONLY, strings.Join(options.Strings(), ",")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(merged, 0); err != nil {
			t.Error(err)
		}
	})
	paths := slices.Clone(names)
	for range 3 {
		for _, p := range slices.Clone(paths) {
			for _, n := range names {
				paths = append(paths, p+"/"+n)
			}
		}
	}
	for _, rel := range paths {
		var want, got fs.FileMode
		if st, err := os.Lstat(filepath.Join(merged, rel)); err == nil {
			want = st.Mode()
		}
		path, err := s.Lookup(rel)
		if err != nil {
			t.Fatal(err)
		}
		if path != "" {
			st, err := os.Lstat(path)
			if err != nil {
				t.Fatal(err)
			}
			got = st.Mode()
		}
		if got != want {
			t.Errorf("%s: found %q with mode %v, the kernel shows %v", rel, path, got, want)
		}
	}
	top, err := s.Top()
	if err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(merged)
	if err != nil {
		t.Fatal(err)
	}
	shown := map[string]bool{}
	for _, e := range entries {
		shown[e.Name()] = true
	}
	if want := slices.Sorted(maps.Keys(shown)); !slices.Equal(top, want) {
		t.Errorf("top %q, the kernel shows %q", top, want)
	}
}

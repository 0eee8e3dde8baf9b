package overlayutil

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOptions(t *testing.T) {
	in := []string{"workdir=/w", "upperdir=/u", `lowerdir=/a\:b:/c\\d:/e`, "index=off", "userxattr"}
	o := ParseOptions(in)
	if !slices.Equal(o.Lower, []string{"/a:b", `/c\d`, "/e"}) || o.Upper != "/u" || o.Work != "/w" || !slices.Equal(o.Rest, in[3:]) {
		t.Errorf("%+v", o)
	}
	if out := o.Strings(); !slices.Equal(out, in) {
		t.Errorf("%q became %q", in, out)
	}
	in = []string{"workdir=/w", "upperdir=/u", `lowerdir+=/a:b`, `lowerdir+=/c`, "index=off"}
	o = ParseOptions(in)
	if !slices.Equal(o.Lower, []string{"/a:b", "/c"}) || !o.Apart || !slices.Equal(o.Strings(), in) {
		t.Errorf("%+v, %q", o, o.Strings())
	}
	if o := ParseOptions([]string{"lowerdir=/a", "lowerdir=/b"}); !slices.Equal(o.Lower, []string{"/b"}) {
		t.Errorf("the last lowerdir counts, not %q", o.Lower)
	}
}

// TestQuotedDirectories asks the kernel whether the quoting is right.
func TestQuotedDirectories(t *testing.T) {
	needRoot(t)
	base, merged := t.TempDir(), t.TempDir()
	var o Options
	for _, name := range []string{"with:colon", `with\backslash`} {
		dir := filepath.Join(base, name)
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		o.Lower = append(o.Lower, dir)
	}
	if err := unix.Mount("overlay", merged, "overlay", unix.MS_RDONLY, strings.Join(o.Strings(), ",")); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(merged, 0)
	for _, name := range []string{"with:colon", `with\backslash`} {
		if _, err := os.Lstat(filepath.Join(merged, name)); err != nil {
			t.Error(err)
		}
	}
}

func FuzzOptions(f *testing.F) {
	f.Add("/a:b", `/c\d`)
	f.Fuzz(func(t *testing.T, a, b string) {
		o := ParseOptions(Options{Lower: []string{a, b}}.Strings())
		if !slices.Equal(o.Lower, []string{a, b}) {
			t.Errorf("%q, %q became %q", a, b, o.Lower)
		}
	})
}

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
	o.Quoted = true
	quoted := slices.Clone(in)
	quoted[2] = `lowerdir=/\a\:b:/\c\\d:/\e`
	if out := o.Strings(); !slices.Equal(out, quoted) {
		t.Errorf("%q became %q", in, out)
	}
	if o := ParseOptions(quoted); !slices.Equal(o.Strings(), in) {
		t.Errorf("%q became %+v", quoted, o)
	}
	if o := ParseOptions([]string{"lowerdir=/a", "lowerdir=/b"}); !slices.Equal(o.Lower, []string{"/b"}) {
		t.Errorf("the last lowerdir counts, not %q", o.Lower)
	}
}

// TestQuotedDirectories verifies the quoting with the kernel.
func TestQuotedDirectories(t *testing.T) {
	needRoot(t)
	base, merged := t.TempDir(), t.TempDir()
	var o Options
	names := []string{"with:colon", `with\backslash`, "plain", `\first`}
	for _, name := range names {
		dir := filepath.Join(base, name)
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		o.Lower = append(o.Lower, dir)
	}
	for _, o.Quoted = range []bool{false, true} {
		if err := unix.Mount("overlay", merged, "overlay", unix.MS_RDONLY, strings.Join(o.Strings(), ",")); err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if _, err := os.Lstat(filepath.Join(merged, name)); err != nil {
				t.Errorf("quoted %v: %v", o.Quoted, err)
			}
		}
		if err := unix.Unmount(merged, 0); err != nil {
			t.Fatal(err)
		}
	}
}

func FuzzOptions(f *testing.F) {
	f.Add("/a:b", `/c\d`)
	f.Fuzz(func(t *testing.T, a, b string) {
		for _, quoted := range []bool{false, true} {
			o := ParseOptions(Options{Lower: []string{a, b}, Quoted: quoted}.Strings())
			if !slices.Equal(o.Lower, []string{a, b}) {
				t.Errorf("%q, %q became %q", a, b, o.Lower)
			}
		}
	})
}

package contents

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"
)

// Entries of a layer, in the order of the tar.
func regular(name, body string) tar.Header {
	// The body travels in a field that a file does not use.
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Linkname: body, Mode: 0o644}
}
func directory(name string) tar.Header {
	return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}
}
func symlink(name, target string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}
}
func hardlink(name, first string) tar.Header {
	return tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: first}
}
func pipe(name string) tar.Header {
	return tar.Header{Typeflag: tar.TypeFifo, Name: name, Mode: 0o600}
}
func global() tar.Header {
	return tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "x"}}
}

// pack makes a tar of entries.
func pack(entries []tar.Header) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		body := ""
		if h.Typeflag == tar.TypeReg {
			body, h.Linkname = h.Linkname, ""
			h.Size = int64(len(body))
		}
		if err := w.WriteHeader(&h); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(w, body); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return b.Bytes(), err
}

// converters are the ways of containerd to unpack whiteouts: by removing, and
// into those of overlayfs.
var converters = map[string][]archive.ApplyOpt{
	"removed": nil,
	"overlay": {archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)},
}

// verified compares a tree with a layer in every way of reading, which must come
// to the same.
func verified(t testing.TB, root string, layer []byte) string {
	t.Helper()
	var all []string
	for _, how := range []Reading{{}, {Direct: true, Idle: true}} {
		found, err := VerifyTar(t.Context(), root, bytes.NewReader(layer), 10, how)
		check(t, err)
		all = append(all, digests.ReplaceAllString(join(found), "sha256digest"))
	}
	if all[0] != all[1] {
		t.Errorf("found %q, and read directly %q", all[0], all[1])
	}
	return all[0]
}

func TestVerifyTar(t *testing.T) {
	for name, c := range contentDamage {
		t.Run(name, func(t *testing.T) {
			root := withContent(t)
			layer, err := os.ReadFile(tarOf(t, root).Name())
			check(t, err)
			check(t, c.change(root))
			want := c.contents
			if c.entry {
				want = ""
			}
			if got := verified(t, root, layer); got != want {
				t.Errorf("found %q, want %q", got, want)
			}
		})
	}
}

// TestOddTars unpacks tars whose entries take each other's place with
// containerd. What it made of them is right, and a change is seen.
func TestOddTars(t *testing.T) {
	big := strings.Repeat("0123456789abcdef", chunk/16)
	long := strings.Repeat("long/", 60) + "name"
	for name, c := range map[string]struct {
		entries []tar.Header
		flip    []string // files, each of which is changed in turn
	}{
		"empty":                 {nil, nil},
		"twice":                 {[]tar.Header{regular("a", "first"), regular("a", "second")}, []string{"a"}},
		"twice, first longer":   {[]tar.Header{regular("a", big+"tail"), regular("a", big)}, []string{"a"}},
		"twice the same":        {[]tar.Header{regular("a", "same"), regular("a", "same")}, []string{"a"}},
		"once empty":            {[]tar.Header{regular("a", "first"), regular("a", ""), regular("b", ""), regular("b", "now")}, []string{"b"}},
		"three spellings":       {[]tar.Header{regular("d/a", "1"), regular("./d//a", "2"), regular("/d/./x/../a", "3")}, []string{"d/a"}},
		"above the root":        {[]tar.Header{regular("a", "first"), regular("../../a", "second")}, []string{"a"}},
		"file, then directory":  {[]tar.Header{regular("a", "x"), directory("a"), regular("a/b", "y")}, []string{"a/b"}},
		"directory, then file":  {[]tar.Header{regular("a/b/c", "x"), regular("a/d", "x"), regular("a", "y")}, []string{"a"}},
		"directory again":       {[]tar.Header{regular("a/b", "x"), directory("a"), regular("a/c", "y"), directory("a")}, []string{"a/b", "a/c"}},
		"file, then symlink":    {[]tar.Header{regular("a", "x"), symlink("a", "b"), regular("b", "y")}, []string{"b"}},
		"symlink, then file":    {[]tar.Header{regular("b", "y"), symlink("a", "b"), regular("a", "x")}, []string{"a", "b"}},
		"file, then pipe":       {[]tar.Header{regular("a", "x"), pipe("a")}, nil},
		"pipe, then file":       {[]tar.Header{pipe("a"), regular("a", "x")}, []string{"a"}},
		"hardlinks":             {[]tar.Header{regular("a", "x"), hardlink("b", "a"), hardlink("c/d", "./b")}, []string{"a", "b", "c/d"}},
		"link, then first new":  {[]tar.Header{regular("a", "old"), hardlink("b", "a"), regular("a", "new")}, []string{"a", "b"}},
		"link of a link":        {[]tar.Header{regular("a", "old"), hardlink("b", "a"), regular("a", "new"), hardlink("c", "b"), regular("b", "newer")}, []string{"a", "b", "c"}},
		"link, then first gone": {[]tar.Header{regular("d/a", "old"), hardlink("b", "/d/a"), pipe("d")}, []string{"b"}},
		"link, then file":       {[]tar.Header{regular("a", "x"), hardlink("b", "a"), regular("b", "y")}, []string{"a", "b"}},
		"file, then link":       {[]tar.Header{regular("a", "x"), regular("b", "y"), hardlink("b", "a")}, []string{"a", "b"}},
		"link to a symlink":     {[]tar.Header{directory("d"), symlink("s", "d"), hardlink("l", "s"), regular("d/f", "old"), regular("l/f", "new")}, []string{"d/f"}},

		"below a link to one":         {[]tar.Header{directory("d"), symlink("s", "d"), hardlink("l", "s"), regular("l/f", "x")}, []string{"d/f"}},
		"below a symlink":             {[]tar.Header{directory("c"), symlink("a", "c"), regular("a/f", "x")}, []string{"c/f"}},
		"below a symlink, again":      {[]tar.Header{regular("c/f", "old"), symlink("a", "c"), regular("a/f", "new")}, []string{"c/f"}},
		"below a symlink, and back":   {[]tar.Header{symlink("a", "c"), regular("a/f", "old"), regular("c/f", "new")}, []string{"c/f"}},
		"absolute symlink":            {[]tar.Header{regular("c/f", "old"), symlink("d/a", "/c"), regular("d/a/f", "new")}, []string{"c/f"}},
		"upward symlink":              {[]tar.Header{regular("c/f", "old"), symlink("d/a", "../../../c/."), regular("d/a/f", "new")}, []string{"c/f"}},
		"two symlinks":                {[]tar.Header{regular("c/d/f", "old"), symlink("a", "b"), symlink("b", "c"), regular("a/d/f", "new")}, []string{"c/d/f"}},
		"symlink given up":            {[]tar.Header{regular("c/f", "old"), symlink("a", "c"), directory("a"), regular("a/f", "new")}, []string{"a/f", "c/f"}},
		"symlink moved":               {[]tar.Header{directory("d"), regular("c/f", "old"), symlink("a", "c"), symlink("a", "d"), regular("a/f", "new")}, []string{"c/f", "d/f"}},
		"symlink used and given up":   {[]tar.Header{regular("c/f", "old"), symlink("a", "c"), regular("a/f", "new"), directory("a"), regular("a/f", "new")}, []string{"a/f", "c/f"}},
		"link through a symlink":      {[]tar.Header{regular("c/l", "old"), regular("f", "x"), symlink("a", "c"), hardlink("a/l", "f")}, []string{"c/l", "f"}},
		"link to below a symlink":     {[]tar.Header{regular("c/f", "old"), symlink("a", "c"), hardlink("l", "a/f"), regular("c/f", "new")}, []string{"c/f", "l"}},
		"removed below a symlink":     {[]tar.Header{regular("c/f", "old"), symlink("a", "c"), pipe("a/f"), regular("g", "x")}, []string{"g"}},
		"whiteouts":                   {[]tar.Header{regular(".wh.gone", ""), regular("d/.wh..wh..opq", ""), regular("d/f", "x"), regular(".wh.d2", "odd")}, []string{"d/f"}},
		"whiteout, then file":         {[]tar.Header{regular(".wh.a", ""), regular("a", "x")}, []string{"a"}},
		"whiteout marks of aufs":      {[]tar.Header{regular("a", "x"), regular(".wh..wh.plnk", "x"), regular(".wh..wh.aufs", "")}, []string{"a"}},
		"global header":               {[]tar.Header{global(), regular("a", "x"), global()}, []string{"a"}},
		"long names":                  {[]tar.Header{regular(long, "x"), {Typeflag: tar.TypeReg, Name: long + "2", Linkname: "y", Format: tar.FormatGNU}, hardlink(long+"3", long)}, []string{long, long + "2", long + "3"}},
		"odd names":                   {[]tar.Header{regular("\xff\xfe \n*[", "x"), regular("...", "y"), regular(" ", "z")}, []string{"\xff\xfe \n*[", "...", " "}},
		"the root itself":             {[]tar.Header{directory("./"), regular("a", "x"), directory("/")}, []string{"a"}},
		"sizes around the buffer":     {[]tar.Header{regular("a", big[1:]), regular("b", big), regular("c", big+"x"), regular("d", big+big), regular("e", "")}, []string{"a", "b", "c", "d"}},
		"content of each other":       {[]tar.Header{regular("a", "one"), regular("b", "two"), regular("a", "two"), regular("b", "one")}, []string{"a", "b"}},
		"one content under two names": {[]tar.Header{regular("a", "same"), regular("b", "same"), hardlink("c", "a"), regular("a", "other")}, []string{"a", "b", "c"}},
	} {
		for how, opts := range converters {
			t.Run(name+", "+how, func(t *testing.T) {
				layer, err := pack(c.entries)
				check(t, err)
				root := t.TempDir()
				_, err = archive.Apply(t.Context(), root, bytes.NewReader(layer), opts...)
				check(t, err)
				if got := verified(t, root, layer); got != "" {
					t.Errorf("a healthy tree: found %q", got)
				}
				for _, name := range c.flip {
					check(t, flipIn(filepath.Join(root, name), 0))
					if got := verified(t, root, layer); !strings.Contains(got, ": sha256digest") {
						t.Errorf("%q changed: found %q", name, got)
					}
					check(t, flipIn(filepath.Join(root, name), 0))
				}
			})
		}
	}
}

// TestOldContent: the content of an earlier entry of the same name is wrong.
func TestOldContent(t *testing.T) {
	layer, err := pack([]tar.Header{regular("a", "first"), regular("b", "other"), regular("a", "newer")})
	check(t, err)
	root := t.TempDir()
	check(t, os.WriteFile(root+"/a", []byte("first"), 0o644))
	check(t, os.WriteFile(root+"/b", []byte("other"), 0o644))
	if got := verified(t, root, layer); got != "a: sha256digest" {
		t.Errorf("found %q", got)
	}
	// Nor is that of another file, when each is at its place.
	check(t, os.WriteFile(root+"/a", []byte("other"), 0o644))
	check(t, os.WriteFile(root+"/b", []byte("newer"), 0o644))
	if got := verified(t, root, layer); got != "a: sha256digest b: sha256digest" {
		t.Errorf("found %q", got)
	}
}

// TestWhiteoutOfItsOwn: a layer may remove what it brings, if whiteouts are
// unpacked by removing.
func TestWhiteoutOfItsOwn(t *testing.T) {
	layer, err := pack([]tar.Header{regular("d/a", "x"), regular("b", "y"), regular(".wh.d", ""), regular("d/a", "z")})
	check(t, err)
	root := t.TempDir()
	_, err = archive.Apply(t.Context(), root, bytes.NewReader(layer))
	check(t, err)
	if got := verified(t, root, layer); got != "" {
		t.Errorf("found %q", got)
	}
}

// TestLinkInLayerBelow unpacks onto a mounted overlay: names of the tar go
// through a link to a directory that is in the layer below, and are in this
// layer under another name.
func TestLinkInLayerBelow(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	for _, d := range []string{"lower/usr/lib", "upper", "work", "merged"} {
		check(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	check(t, os.Symlink("usr/lib", dir+"/lower/lib"))
	check(t, os.WriteFile(dir+"/lower/first", []byte("from below"), 0o644))
	err := unix.Mount("overlay", dir+"/merged", "overlay", 0, "lowerdir="+dir+"/lower,upperdir="+dir+"/upper,workdir="+dir+"/work")
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
		t.Skipf("no overlay on the file system of %s: %v", dir, err)
	}
	check(t, err)
	t.Cleanup(func() { check(t, unix.Unmount(dir+"/merged", 0)) })
	layer, err := pack([]tar.Header{
		regular("usr/lib/both", "old"), regular("lib/both", "new"), regular("lib/only", "x"), regular("usr/lib/own", "y"),
		hardlink("second", "first"), regular("first", "new"),
	})
	check(t, err)
	_, err = archive.Apply(t.Context(), dir+"/merged", bytes.NewReader(layer), archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
	check(t, err)
	if got := verified(t, dir+"/upper", layer); got != "" {
		t.Errorf("found %q", got)
	}
	check(t, flipIn(dir+"/upper/usr/lib/both", 0))
	check(t, flipIn(dir+"/upper/usr/lib/own", 0))
	check(t, flipIn(dir+"/upper/first", 0))
	if got := verified(t, dir+"/upper", layer); got != "first: sha256digest usr/lib/both: sha256digest usr/lib/own: sha256digest" {
		t.Errorf("found %q", got)
	}
}

// TestSparse has GNU tar pack files with holes in each format that it knows.
func TestSparse(t *testing.T) {
	root := t.TempDir()
	check(t, os.WriteFile(root+"/hole", []byte("begin"), 0o644))
	check(t, os.Truncate(root+"/hole", 5*chunk))
	check(t, os.WriteFile(root+"/rest", []byte("after"), 0o644))
	f, err := os.OpenFile(root+"/hole", os.O_WRONLY, 0)
	check(t, err)
	_, err = f.WriteAt([]byte("middle"), 3*chunk+123)
	check(t, errors.Join(err, f.Close()))
	for _, format := range [][]string{
		{"--format=gnu"}, {"--format=posix", "--sparse-version=0.0"}, {"--format=posix", "--sparse-version=0.1"}, {"--format=posix", "--sparse-version=1.0"},
	} {
		layer, err := os.ReadFile(tarOf(t, root, append(format, "--sparse")...).Name())
		check(t, err)
		if len(layer) > chunk {
			t.Fatalf("%v: %d bytes, not sparse", format, len(layer))
		}
		if got := verified(t, root, layer); got != "" {
			t.Errorf("%v: found %q", format, got)
		}
		check(t, flipIn(root+"/hole", 2*chunk))
		if got := verified(t, root, layer); got != "hole: sha256digest" {
			t.Errorf("%v: found %q", format, got)
		}
		check(t, flipIn(root+"/hole", 2*chunk))
	}
}

// TestBrokenLayer: a tar that cannot be read is no evidence against the tree.
func TestBrokenLayer(t *testing.T) {
	root := withContent(t)
	layer, err := os.ReadFile(tarOf(t, root).Name())
	check(t, err)
	stop := errors.New("stop")
	for name, r := range map[string]io.Reader{
		"cut short": bytes.NewReader(layer[:len(layer)/2]),
		"garbage":   strings.NewReader(strings.Repeat("garbage", 1000)),
		"error":     io.MultiReader(bytes.NewReader(layer[:len(layer)/2]), iotest.ErrReader(stop)),
		"late":      io.MultiReader(bytes.NewReader(layer), iotest.ErrReader(stop)),
	} {
		found, err := VerifyTar(t.Context(), root, r, 10, Reading{})
		if err == nil || found != nil {
			t.Errorf("%s: found %v", name, found)
		}
		if (name == "error" || name == "late") && !errors.Is(err, stop) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestWholeLayerIsRead: a digest taken on the way is that of the whole file.
func TestWholeLayerIsRead(t *testing.T) {
	root := withContent(t)
	layer, err := os.ReadFile(tarOf(t, root).Name())
	check(t, err)
	layer = append(layer, make([]byte, 100_000)...)
	hash := sha256.New()
	_, err = VerifyTar(t.Context(), root, io.TeeReader(bytes.NewReader(layer), hash), 10, Reading{})
	check(t, err)
	if want := sha256.Sum256(layer); !bytes.Equal(hash.Sum(nil), want[:]) {
		t.Error("not all of it was read")
	}
}

// TestRealLayer compares what containerd unpacks of a tree of this machine.
func TestRealLayer(t *testing.T) {
	tree := "/usr/share/perl"
	if _, err := os.Stat(tree); errors.Is(err, fs.ErrNotExist) {
		tree = "/usr/share"
	}
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skip("no tar")
	}
	f := tarOf(t, tree)
	layer, err := os.ReadFile(f.Name())
	check(t, err)
	root := t.TempDir()
	_, err = archive.Apply(t.Context(), root, bytes.NewReader(layer))
	check(t, err)
	if got := verified(t, root, layer); got != "" {
		t.Errorf("found %q", got)
	}
}

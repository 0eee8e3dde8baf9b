package marks

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// TestTimes: what the times of a directory prove, for clocks with and without
// fractions of a second.
func TestTimes(t *testing.T) {
	at := func(sec, nsec int64) unix.Timespec { return unix.NsecToTimespec(sec*1e9 + nsec) }
	born, read := at(1000, 5), at(1010, 11)
	for name, c := range map[string]struct {
		times
		want evidence
	}{
		"change inside":                             {times{born, at(1003, 7), at(1003, 7), &born}, invented},
		"change inside, read":                       {times{read, at(1003, 7), at(1003, 7), &born}, invented},
		"change inside, no birth time":              {times{read, at(1003, 7), at(1003, 7), nil}, invented},
		"then a mark":                               {times{born, at(1003, 7), at(1004, 9), &born}, invented},
		"then a mark, read":                         {times{read, at(1003, 7), at(1004, 9), &born}, maybeInvented},
		"nothing inside but a mark":                 {times{born, born, at(1004, 9), &born}, invented},
		"then a mark, no birth time":                {times{born, at(1003, 7), at(1004, 9), nil}, maybeInvented},
		"time of a tar":                             {times{at(500, 0), at(500, 0), at(1004, 9), &born}, fromTar},
		"time of a tar, read":                       {times{read, at(500, 0), at(1004, 9), &born}, fromTar},
		"of the same second":                        {times{at(1004, 0), at(1004, 0), at(1004, 9), &born}, fromTar},
		"in the future":                             {times{at(9000, 0), at(9000, 0), at(1004, 9), &born}, fromTar},
		"of a tar with fractions":                   {times{at(500, 3), at(500, 3), at(1004, 9), &born}, maybeFromTar},
		"of a tar with fractions, while extracting": {times{at(1003, 3), at(1003, 3), at(1004, 9), &born}, maybeInvented},
		"mark, and the clock was set back":          {times{born, at(1003, 7), at(900, 9), &born}, maybeFromTar},
		"whole seconds: change inside":              {times{at(1003, 0), at(1003, 0), at(1003, 0), nil}, maybeInvented},
		"whole seconds: then a mark":                {times{at(1003, 0), at(1003, 0), at(1005, 0), nil}, maybeInvented},
		"whole seconds: time of a tar":              {times{at(500, 0), at(500, 0), at(1005, 0), nil}, maybeFromTar},
		"whole seconds: in the future":              {times{at(9000, 0), at(9000, 0), at(1005, 0), nil}, maybeFromTar},
		"whole seconds: just before Prepare":        {times{at(999, 0), at(999, 0), at(1005, 0), nil}, maybeInvented},
		"whole seconds: long before Prepare":        {times{at(990, 0), at(990, 0), at(1005, 0), nil}, maybeFromTar},
		"fractions, whole second by accident":       {times{born, at(1003, 7), at(1005, 0), &born}, maybeInvented},
	} {
		if got := c.evidence(time.Unix(1000, 0)); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

// TestInconclusive: the blob decides where times do not, and without one the
// probable is taken. Nothing else reads it.
func TestInconclusive(t *testing.T) {
	root := t.TempDir()
	dirs := NewTarDirs(root)
	for _, h := range []tar.Header{dir("entry", 0o755, 0), file("file/in"), dir("./spelt//so", 0o755, 0)} {
		if ok, err := dirs.Filter(&h); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	asked := 0
	withBlob := func() *Origin {
		asked = 0
		return &Origin{Load: func(context.Context) (*TarDirs, error) { asked++; return dirs, nil }}
	}
	without := func() *Origin {
		asked = 0
		return &Origin{Load: func(context.Context) (*TarDirs, error) { asked++; return nil, errors.New("no blob") }}
	}
	quiet(t)
	for _, c := range []struct {
		origin *Origin
		rel    string
		found  evidence
		want   bool
		asked  int
	}{
		{withBlob(), "entry", maybeInvented, false, 1},
		{withBlob(), "spelt/so", maybeInvented, false, 1},
		{withBlob(), "file", maybeFromTar, true, 1},
		{withBlob(), "file", fromTar, false, 0},
		{withBlob(), "entry", invented, true, 0},
		{without(), "entry", maybeInvented, true, 1},
		{without(), "entry", maybeFromTar, false, 1},
		{&Origin{}, "entry", maybeInvented, true, 0},
	} {
		asked = 0
		for range 2 {
			got, err := c.origin.decide(t.Context(), c.rel, c.found)
			if err != nil || got != c.want {
				t.Errorf("%s with evidence %d: %v, %v", c.rel, c.found, got, err)
			}
		}
		if asked != c.asked {
			t.Errorf("%s with evidence %d: the blob was read %d times, want %d", c.rel, c.found, asked, c.asked)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := without().decide(ctx, "entry", maybeInvented); !errors.Is(err, context.Canceled) {
		t.Errorf("a Commit whose context has ended decides: %v", err)
	}
}

// TestTarDirs: entries are found under the paths that the applier makes of their
// names, through links, too.
func TestTarDirs(t *testing.T) {
	root := t.TempDir()
	dirs := NewTarDirs(root)
	entries := []tar.Header{
		dir("real/deep", 0o755, 0),
		{Typeflag: tar.TypeSymlink, Name: "link", Linkname: "/real"},
		{Typeflag: tar.TypeSymlink, Name: "up", Linkname: "../../.."},
		dir("link/through", 0o755, 0), dir("up/out", 0o755, 0), dir("/absolute", 0o755, 0),
		{Typeflag: tar.TypeSymlink, Name: "replaced", Linkname: "real"}, dir("replaced", 0o755, 0),
		file("invented/file"), dir(".", 0o755, 0),
	}
	if _, err := archive.Apply(t.Context(), root, tarOf(t, entries), archive.WithFilter(dirs.Filter)); err != nil {
		t.Fatal(err)
	}
	var got []string
	if err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		rel, _ := filepath.Rel(root, path)
		if err == nil && d.IsDir() && dirs.evidence(rel) == fromTar {
			got = append(got, rel)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if want := "[absolute out real/deep real/through replaced]"; fmt.Sprint(got) != want {
		t.Errorf("%v, want %s", got, want)
	}
}

func tarOf(t *testing.T, entries []tar.Header) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func dir(name string, mode int64, uid int) tar.Header {
	return tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode, Uid: uid, Gid: uid}
}

func file(name string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}
}

// quiet drops log lines until the test ends.
func quiet(t *testing.T) {
	out := log.L.Logger.Out
	log.L.Logger.SetOutput(io.Discard)
	t.Cleanup(func() { log.L.Logger.SetOutput(out) })
}

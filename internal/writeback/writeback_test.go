package writeback

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

// site is a tree that is followed, and what was begun to be written since the last question.
type site struct {
	*follower
	dir   string
	begun []string
}

func newSite(t *testing.T) *site {
	s := &site{dir: t.TempDir()}
	fd, err := unix.Open(s.dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	treetest.Check(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	s.follower = newFollower(fd, func(fd int) {
		path, err := os.Readlink(fmt.Sprint("/proc/self/fd/", fd))
		treetest.Check(t, err)
		s.begun = append(s.begun, path)
	})
	return s
}

// file makes a file of a size, with the time that an archive has for it, or with that of now.
func (s *site) make(t *testing.T, name string, size int, complete bool) {
	t.Helper()
	path := filepath.Join(s.dir, name)
	treetest.Check(t, os.MkdirAll(filepath.Dir(path), 0o755))
	treetest.Check(t, os.WriteFile(path, make([]byte, size), 0o644))
	if complete {
		s.stamp(t, name, time.Unix(1e9, 0))
	}
}

func (s *site) stamp(t *testing.T, name string, when time.Time) {
	t.Helper()
	treetest.Check(t, os.Chtimes(filepath.Join(s.dir, name), when, when))
}

// expect makes a pass, and compares what was begun.
func (s *site) expect(t *testing.T, names ...string) {
	t.Helper()
	s.begun = nil
	s.pass(t.Context())
	var got []string
	for _, path := range s.begun {
		rel, err := filepath.Rel(s.dir, path)
		treetest.Check(t, err)
		got = append(got, rel)
	}
	slices.Sort(got)
	if !slices.Equal(got, names) {
		t.Errorf("begun are %q, want %q", got, names)
	}
}

// TestPass: large files are begun as they come and as they grow, in directories that come,
// too, and each once when it is complete.
func TestPass(t *testing.T) {
	s := newSite(t)
	s.expect(t)
	s.make(t, "small", large-1, true)
	s.make(t, "large", large, true)
	s.make(t, "a/b/deep", large, true)
	s.expect(t, "a/b/deep", "large")
	s.expect(t)
	s.make(t, "a/growing", 10, false)
	s.expect(t)
	s.make(t, "a/growing", large, false)
	s.expect(t, "a/growing")
	s.make(t, "a/growing", 2*large, true)
	s.expect(t, "a/growing")
	s.expect(t)
	if len(s.coming) != 0 {
		t.Errorf("files that are complete are visited still: %v", s.coming)
	}
}

// TestGrown: each byte of a file counts once, of small files, too, and not that of a hole.
func TestGrown(t *testing.T) {
	s := newSite(t)
	expect := func(want int64) {
		t.Helper()
		if s.pass(t.Context()); s.grown != want {
			t.Errorf("%d bytes have come, want %d", s.grown, want)
		}
	}
	expect(0)
	s.make(t, "a/small", 100, true)
	s.make(t, "growing", 1000, false)
	expect(1100)
	expect(0)
	s.make(t, "growing", 100_000, false)
	s.make(t, "hole", 0, false)
	treetest.Check(t, os.Truncate(filepath.Join(s.dir, "hole"), 1<<30))
	expect(99_000)
	f, err := os.OpenFile(filepath.Join(s.dir, "hole"), os.O_WRONLY, 0)
	treetest.Check(t, err)
	_, err = f.WriteAt(make([]byte, 64<<10), 0)
	treetest.Check(t, errors.Join(err, f.Close()))
	expect(64 << 10)
	s.make(t, "growing", 200_000, true)
	expect(100_000)
	expect(0)
}

// TestFuture: a board without a clock lives in 1970, and all times of an archive lie in the
// future. What does not grow is complete all the same, some passes later.
func TestFuture(t *testing.T) {
	s := newSite(t)
	s.make(t, "large", large, false)
	s.stamp(t, "large", time.Now().Add(1e6*time.Hour))
	s.expect(t, "large")
	for range still {
		s.expect(t)
	}
	if len(s.coming) != 0 {
		t.Errorf("it is visited still: %v", s.coming)
	}
}

// TestNothingElse: no link is followed, nothing is opened that is no regular file, and nothing
// that is mounted in the tree is visited.
func TestNothingElse(t *testing.T) {
	s, outside := newSite(t), newSite(t)
	outside.make(t, "large", large, true)
	treetest.Check(t, os.Symlink(outside.dir+"/large", s.dir+"/link"))
	treetest.Check(t, os.Symlink(outside.dir, s.dir+"/way"))
	treetest.Check(t, unix.Mkfifo(s.dir+"/fifo", 0o600)) // to open it would wait for a reader
	treetest.Check(t, unix.Mknod(s.dir+"/device", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	for _, name := range []string{"dir", "file"} {
		at, what := filepath.Join(s.dir, name), outside.dir
		if name == "file" {
			s.make(t, name, 0, true)
			what = outside.dir + "/large"
		} else {
			treetest.Check(t, os.Mkdir(at, 0o755))
		}
		treetest.Check(t, unix.Mount(what, at, "", unix.MS_BIND, ""))
		t.Cleanup(func() { treetest.Check(t, unix.Unmount(at, unix.MNT_DETACH)) })
	}
	s.expect(t)
	s.write("fifo") // as when it has taken the place of a file just now
	s.write("device")
	s.write("link")
	s.write("way/large")
	s.write("file")
	if len(s.begun) != 0 {
		t.Errorf("begun are %q", s.begun)
	}
}

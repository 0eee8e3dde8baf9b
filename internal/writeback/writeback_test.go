package writeback

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestPass: large files are written as they come, in directories that come, too, and nothing
// else is opened.
func TestPass(t *testing.T) {
	root, outside := t.TempDir(), filepath.Join(t.TempDir(), "outside")
	content := bytes.Repeat([]byte("content "), 1<<20)
	write := func(path string) {
		t.Helper()
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(outside)
	if !inMemory(t, outside) {
		t.Skip("the file system of " + t.TempDir() + " does not report what is in memory only (FIEMAP_EXTENT_DELALLOC)")
	}
	fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	f := newFollower(fd)
	if !f.pass(t.Context()) {
		t.Error("a new tree is no news")
	}
	write(root + "/first")
	for _, err := range []error{
		unix.Mkfifo(root+"/fifo", 0o600), // to open it would wait for a reader
		os.Symlink(outside, root+"/link"),
		os.Symlink(filepath.Dir(outside), root+"/way"),
		os.MkdirAll(root+"/a/b", 0o700),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	write(root + "/a/b/second")
	f.pass(t.Context())
	for _, name := range []string{"first", "a/b/second"} {
		if inMemory(t, filepath.Join(root, name)) {
			t.Errorf("%s is not being written", name)
		}
	}
	// It grows, as a large file does while it is extracted.
	write(root + "/first")
	f.pass(t.Context())
	if inMemory(t, root+"/first") {
		t.Error("the rest of a file is not being written")
	}
	if !inMemory(t, outside) {
		t.Error("a link was followed")
	}
	// A board without a clock lives in 1970: then all times lie in the future.
	write(root + "/future")
	future := unix.NsecToTimeval(4e18)
	if err := unix.Utimes(root+"/future", []unix.Timeval{future, future}); err != nil {
		t.Fatal(err)
	}
	for range still + 2 {
		f.pass(t.Context())
	}
	if len(f.coming) != 0 {
		t.Errorf("files that do not grow are followed still: %v", f.coming)
	}
	if f.pass(t.Context()) {
		t.Error("nothing has come, and it is news")
	}
	write(root + "/a/third")
	f.pass(t.Context())
	old := unix.NsecToTimeval(1e18)
	if err := unix.Utimes(root+"/a/third", []unix.Timeval{old, old}); err != nil {
		t.Fatal(err)
	}
	f.pass(t.Context())
	if len(f.coming) != 0 {
		t.Errorf("files with the times of an archive are followed still: %v", f.coming)
	}
}

// inMemory reports whether a file has content that has no place on the disk yet
// (Documentation/filesystems/fiemap.rst).
func inMemory(t *testing.T, path string) bool {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	const fiemap, delalloc = 0xc020660b, 0x4
	type extent struct {
		logical, physical, length uint64
		_                         [2]uint64
		flags                     uint32
		_                         [3]uint32
	}
	query := struct {
		start, length                  uint64
		flags, mapped, count, reserved uint32
		extents                        [64]extent
	}{length: ^uint64(0), count: 64}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, file.Fd(), fiemap, uintptr(unsafe.Pointer(&query))); errno != 0 {
		return false
	}
	for _, e := range query.extents[:query.mapped] {
		if e.flags&delalloc != 0 {
			return true
		}
	}
	return false
}

package fsync

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// written makes a file of some bytes, and returns its descriptor.
func written(t *testing.T, path string, n int) int {
	t.Helper()
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o600)
	if err == nil {
		_, err = unix.Write(fd, make([]byte, n))
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func isOpen(fd int) bool {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	return err == nil
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	before, roomBefore := waiting.Load(), room.Load()
	f := NewFiles(dir)
	small, big := written(t, filepath.Join(dir, "small"), 1), written(t, filepath.Join(dir, "big"), 100_000)
	if !f.Add(small, 1, false) || !f.Add(big, 100_000, true) {
		t.Fatal("there was no room")
	}
	file, err := os.Create(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.AddFile(file), file.Close()); err != nil {
		t.Fatal(err)
	}
	if n := waiting.Load() - before; n != int64(os.Getpagesize()) {
		t.Errorf("%d bytes are to be written, want one page", n)
	}
	if _, err := f.Busy(); err != nil {
		t.Error(err)
	}
	if err := f.Sync(); err != nil || !f.Complete() {
		t.Errorf("%v, complete %v", err, f.Complete())
	}
	f.Close()
	f.Close()
	if isOpen(small) || isOpen(big) || waiting.Load() != before || room.Load() != roomBefore {
		t.Errorf("after Close: open %v %v, %d bytes, room for %d of %d", isOpen(small), isOpen(big), waiting.Load()-before, room.Load(), roomBefore)
	}
	// An error names the file.
	gone := written(t, filepath.Join(dir, "gone"), 1)
	if err := unix.Close(gone); err != nil {
		t.Fatal(err)
	}
	broken := NewFiles(dir)
	broken.Add(gone, 1, false)
	if err := broken.Sync(); !errors.As(err, new(*Error)) {
		t.Errorf("error of a descriptor that is closed: %v", err)
	}
	nowhere := NewFiles(filepath.Join(dir, "nowhere"))
	if err := nowhere.Sync(); err == nil || errors.As(err, new(*Error)) {
		t.Errorf("no place for the last file: %v", err)
	}
	var none *Files
	none.Close()
	if none.Add(1, 1, false) || none.AddFile(os.Stdin) != nil || none.Complete() {
		t.Error("nil keeps files")
	}
}

// TestTooManyFiles: what cannot be kept is left to the caller, and all that was kept is closed.
func TestTooManyFiles(t *testing.T) {
	dir := t.TempDir()
	roomBefore := room.Load()
	defer func() { room.Add(roomBefore - room.Load()) }()
	room.Store(1)
	f := NewFiles(dir)
	first, second := written(t, filepath.Join(dir, "1"), 1), written(t, filepath.Join(dir, "2"), 1)
	defer unix.Close(second)
	if !f.Add(first, 1, false) || f.Add(second, 1, false) || f.Complete() || isOpen(first) || !isOpen(second) || room.Load() != 1 {
		t.Errorf("complete %v, open %v %v, room for %d", f.Complete(), isOpen(first), isOpen(second), room.Load())
	}
	if f.Add(second, 1, false) {
		t.Error("it is kept although another was not")
	}
}

// TestBegin: what it fails over is an error of Wait, which the kernel would not report again.
func TestBegin(t *testing.T) {
	var pipe [2]int // cannot be written to a disk
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pipe[0])
	f := NewFiles(t.TempDir())
	defer f.Close()
	f.Add(pipe[1], 1, false)
	f.Begin()
	f.beginning.Wait()
	file, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err == nil {
		err = errors.Join(unix.Dup3(int(file.Fd()), pipe[1], unix.O_CLOEXEC), file.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := f.Wait(); !errors.Is(err, unix.ESPIPE) || !errors.As(err, new(*Error)) {
			t.Errorf("error %v", err)
		}
	}
}

// TestCloseDuringBegin: Close does not wait for a disk that is slow to begin, and no number of a
// file that is in use goes to another one.
func TestCloseDuringBegin(t *testing.T) {
	fd := written(t, filepath.Join(t.TempDir(), "file"), 10)
	f := NewFiles(t.TempDir())
	f.Add(fd, 10, false)
	f.Begin()
	f.beginning.Add(1) // the disk takes its time
	f.Close()
	f.Close()
	if !isOpen(fd) {
		t.Error("a file is closed while it is in use")
	}
	f.beginning.Done()
	for isOpen(fd) {
		time.Sleep(time.Millisecond)
	}
}

// TestBusy: another file with much to be written makes a syncfs the longer way, unless this
// Files has so many files that their requests take longer still.
func TestBusy(t *testing.T) {
	dir := t.TempDir()
	f, many := NewFiles(dir), NewFiles(dir)
	many.rest = make([]int, 1<<20)
	data := make([]byte, 3*little)
	for range 10 { // another process may have everything written just then
		if err := os.WriteFile(filepath.Join(dir, "other"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		if busy, err := many.Busy(); busy || err != nil {
			t.Fatalf("with a million files: %v, %v", busy, err)
		}
		if busy, err := f.Busy(); err != nil {
			t.Fatal(err)
		} else if busy {
			return
		}
	}
	t.Error("never busy beside 192 MiB to be written")
}

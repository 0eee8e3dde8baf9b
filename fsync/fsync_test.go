package fsync

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestExt4Warnings(t *testing.T) {
	for name, c := range map[string]struct {
		options string
		want    []string // words of the warnings, in order
	}{
		"as it should be": {"rw\nbarrier\ndata=ordered", nil},
		"no journal":      {"rw\nbarrier", []string{"no journal"}},
		"writeback":       {"rw\nbarrier\ndata=writeback", []string{"data=writeback"}},
		"no barrier":      {"rw\nnobarrier\ndata=ordered", []string{"nobarrier"}},
		"both":            {"rw\nnobarrier\ndata=writeback", []string{"data=writeback", "nobarrier"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := ext4Warnings("/r", strings.Split(c.options, "\n"))
			if len(got) != len(c.want) {
				t.Fatalf("got %v, want %v", got, c.want)
			}
			for i, w := range got {
				if !strings.Contains(w.Problem, c.want[i]) || w.Cure == "" {
					t.Errorf("warning %d is %+v, want %q and a cure", i, w, c.want[i])
				}
			}
		})
	}
}

func TestAtLeast(t *testing.T) {
	for release, want := range map[string]bool{
		"5.17.0": true, "5.16.20-generic": false, "6.18.44-fc-v657": true, "4.19": false,
		"5.17-rc1": true, "10.0.1": true, "": false, "x.y": false, "5": false,
	} {
		if got := atLeast(release, 5, 17); got != want {
			t.Errorf("atLeast(%q, 5, 17) = %v", release, got)
		}
	}
}

func TestInspectRefusesTmpfs(t *testing.T) {
	var st unix.Statfs_t
	if err := unix.Statfs("/dev/shm", &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		t.Skip("/dev/shm is no tmpfs on this machine")
	}
	_, err := Inspect("/dev/shm")
	if !errors.Is(err, ErrUnsuitable) || !strings.Contains(err.Error(), "tmpfs") {
		t.Errorf("got %v", err)
	}
}

func TestCursor(t *testing.T) {
	dir := t.TempDir()
	c, err := OpenCursor(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Sync(); err != nil {
		t.Error(err)
	}
	c.err = errors.New("as the kernel would report once")
	if err := c.Sync(); err == nil {
		t.Error("an error was forgotten: the next syncfs of the kernel returns 0 over lost pages")
	}
	if err := errors.Join(c.Close(), c.Close()); err != nil {
		t.Error(err)
	}
	if err := c.Sync(); !errors.Is(err, ErrClosed) {
		t.Errorf("got %v, want ErrClosed", err)
	}

	link := filepath.Join(dir, "link")
	if err := os.Symlink("/", link); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenCursor(link); err == nil {
		t.Error("a cursor followed a symlink to another file system")
	}
}

func TestRenameStaysInItsDirectory(t *testing.T) {
	dir := t.TempDir()
	if err := MkdirAll(filepath.Join(dir, "a", "b"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Rename(filepath.Join(dir, "f"), filepath.Join(dir, "a", "f")); err == nil {
		t.Error("renamed into a directory that is not synced")
	}
	if err := Rename(filepath.Join(dir, "f"), filepath.Join(dir, "g")); err != nil {
		t.Error(err)
	}
	if err := MkdirAll(filepath.Join(dir, "g", "h"), 0o700); err == nil {
		t.Error("made a directory below a file")
	}
}

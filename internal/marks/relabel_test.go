package marks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
)

// TestRelabel: a healed tree gets the labels of the old one, and none through a
// link or a mount in it.
func TestRelabel(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("security attributes need root")
	}
	label := func(path, value string) {
		t.Helper()
		if err := unix.Lsetxattr(path, "security.selinux", []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	fill := func(root string, dirs, files []string) {
		t.Helper()
		for _, d := range dirs {
			if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for _, f := range files {
			if err := os.WriteFile(filepath.Join(root, f), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	before, after, elsewhere := t.TempDir(), t.TempDir(), t.TempDir()
	fill(before, []string{"dir/sub", "mounted"}, []string{"dir/file", "bare"})
	fill(after, []string{"dir/sub/new/deeper", "linked", "mounted"}, []string{"dir/file", "dir/fresh", "dir/sub/new/deeper/x", "linked/file", "mounted/file", "bare"})
	fill(elsewhere, nil, []string{"file"})
	for _, root := range []string{before, after} {
		if err := os.Symlink("dir", filepath.Join(root, "symlink")); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(elsewhere, filepath.Join(before, "linked")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(elsewhere, filepath.Join(before, "mounted"), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(filepath.Join(before, "mounted"), 0)
	label(elsewhere, "outside")
	label(filepath.Join(elsewhere, "file"), "outside")
	for rel, value := range map[string]string{".": "root", "dir": "d", "dir/sub": "s", "dir/file": "f", "symlink": "l"} {
		label(filepath.Join(before, rel), value)
	}
	if err := unix.Lsetxattr(filepath.Join(before, "dir/file"), "security.SMACK64", []byte("smack"), 0); err != nil {
		t.Fatal(err)
	}
	label(filepath.Join(after, "dir/file"), "of healing")

	if err := Relabel(t.Context(), after, before); err != nil {
		t.Fatal(err)
	}
	for rel, want := range map[string]string{
		".": "root", "dir": "d", "dir/sub": "s", "dir/file": "f", "symlink": "l", "bare": "root",
		"dir/fresh": "d", "dir/sub/new/deeper/x": "s", "linked/file": "root", "mounted/file": "root",
	} {
		if got := xattrsOf(t, filepath.Join(after, rel)); !strings.Contains(got, "{security.selinux "+want+"}") {
			t.Errorf("%s: %s, want %s", rel, got, want)
		}
	}
	if got := xattrsOf(t, filepath.Join(after, "dir/file")); !strings.Contains(got, "{security.SMACK64 smack}") {
		t.Errorf("dir/file: %s", got)
	}
	if err := Relabel(t.Context(), after, filepath.Join(before, "missing")); err != nil {
		t.Errorf("without an old tree: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Relabel(ctx, after, before); !errors.Is(err, context.Canceled) {
		t.Errorf("its context has ended: %v", err)
	}
}

func xattrsOf(t *testing.T, path string) string {
	t.Helper()
	e, err := seal.Read(path, ".")
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(e.Xattrs)
}

package snapshotter

import (
	iofs "io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"
)

// layer makes a small tree with every kind of entry.
func layer(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(filepath.Join(root, "dir"), 0o755))
	must(os.WriteFile(filepath.Join(root, "dir", "file"), []byte("content"), 0o644))
	must(os.Link(filepath.Join(root, "dir", "file"), filepath.Join(root, "hard")))
	must(os.Symlink("dir/file", filepath.Join(root, "soft")))
	must(unix.Mknod(filepath.Join(root, "whiteout"), unix.S_IFCHR, 0))
	must(unix.Setxattr(filepath.Join(root, "dir"), "trusted.overlay.opaque", []byte("y"), 0))
	still(t, root)
	return root
}

// still gives every entry the same times, so that a change shows by itself and
// not by the times it moved.
func still(t *testing.T, root string) {
	t.Helper()
	if err := filepath.WalkDir(root, func(path string, _ iofs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return unix.Lutimes(path, []unix.Timeval{{Sec: 1}, {Sec: 1}})
	}); err != nil {
		t.Fatal(err)
	}
}

func census1(t *testing.T, root string) census {
	t.Helper()
	c, err := walk(t.Context(), root, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestWalkCountsAsContainerd(t *testing.T) {
	root := layer(t)
	want, err := fs.DiskUsage(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	got := census1(t, root)
	if got.Usage.Size != want.Size || got.Usage.Inodes != want.Inodes {
		t.Errorf("usage %+v, containerd counts %+v", got.Usage, want)
	}
	if got.Entries != 6 || got.Bytes != int64(len("content")) {
		t.Errorf("%d entries, %d bytes", got.Entries, got.Bytes)
	}
}

func TestDigestSeesEveryChange(t *testing.T) {
	for name, change := range map[string]func(root string) error{
		"file removed":    func(r string) error { return os.Remove(filepath.Join(r, "hard")) },
		"file added":      func(r string) error { return os.WriteFile(filepath.Join(r, "dir", "x"), nil, 0o644) },
		"file renamed":    func(r string) error { return os.Rename(filepath.Join(r, "soft"), filepath.Join(r, "sofd")) },
		"file shortened":  func(r string) error { return os.Truncate(filepath.Join(r, "hard"), 0) },
		"mode":            func(r string) error { return os.Chmod(filepath.Join(r, "hard"), 0o755) },
		"setuid":          func(r string) error { return os.Chmod(filepath.Join(r, "hard"), 0o644|os.ModeSetuid) },
		"owner":           func(r string) error { return os.Lchown(filepath.Join(r, "soft"), 1, 1) },
		"mode of root":    func(r string) error { return os.Chmod(r, 0o711) },
		"time":            func(r string) error { return os.Chtimes(filepath.Join(r, "hard"), time.Time{}, time.Unix(2, 0)) },
		"hardlink broken": func(r string) error { return rewrite(filepath.Join(r, "hard")) },
		"link target": func(r string) error {
			p := filepath.Join(r, "soft")
			if err := os.Remove(p); err != nil {
				return err
			}
			return os.Symlink("dir/fild", p)
		},
		"whiteout is a file": func(r string) error {
			p := filepath.Join(r, "whiteout")
			if err := os.Remove(p); err != nil {
				return err
			}
			return os.WriteFile(p, nil, 0o644)
		},
		"opaque removed": func(r string) error { return unix.Removexattr(filepath.Join(r, "dir"), "trusted.overlay.opaque") },
		"opaque changed": func(r string) error {
			return unix.Setxattr(filepath.Join(r, "dir"), "trusted.overlay.opaque", []byte("x"), 0)
		},
		"xattr added": func(r string) error { return unix.Setxattr(filepath.Join(r, "hard"), "user.x", []byte("1"), 0) },
	} {
		t.Run(name, func(t *testing.T) {
			root := layer(t)
			before := census1(t, root)
			if again := census1(t, root); again.Digest != before.Digest {
				t.Fatal("two walks over the same tree differ")
			}
			if err := change(root); err != nil {
				t.Fatal(err)
			}
			if name != "time" {
				still(t, root)
			}
			if after := census1(t, root); after.Digest == before.Digest {
				t.Error("not seen")
			}
		})
	}
	t.Run("what the kernel sets on layers in use is not seen", func(t *testing.T) {
		root := layer(t)
		before := census1(t, root)
		for _, x := range []string{"origin", "impure", "nlink", "uuid", "upper"} {
			if err := unix.Setxattr(filepath.Join(root, "dir"), "trusted.overlay."+x, []byte("y"), 0); err != nil {
				t.Fatal(err)
			}
		}
		if after := census1(t, root); after.Digest != before.Digest {
			t.Error("seen")
		}
	})
}

// rewrite makes a hardlinked file one of its own.
func rewrite(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	return os.WriteFile(path, b, st.Mode())
}

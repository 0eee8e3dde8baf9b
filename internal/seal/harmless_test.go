package seal

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/contents"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
)

// sealBefore seals a tree as versions before this one did: with link counts, and
// with all extended attributes in full.
func sealBefore(t testing.TB, root string) (path, digest string) {
	t.Helper()
	var b strings.Builder
	b.WriteString("#mtree v2.0\n")
	check(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		check(t, err)
		rel, err := filepath.Rel(root, path)
		check(t, err)
		var st unix.Stat_t
		check(t, unix.Lstat(path, &st))
		line := "."
		if rel != "." {
			line = string(mtree.AppendVis([]byte("./"), rel))
		}
		line += fmt.Sprintf(" type=%s mode=0%o uid=%d gid=%d", mtree.TypeName(st.Mode&unix.S_IFMT), st.Mode&^unix.S_IFMT, st.Uid, st.Gid)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			line += fmt.Sprintf(" nlink=%d size=%d", st.Nlink, st.Size)
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			check(t, err)
			line += " link=" + string(mtree.AppendVis(nil, target))
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" device=native,%d,%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		line += fmt.Sprintf(" time=%d.%09d", st.Mtim.Sec, st.Mtim.Nsec)
		names := make([]byte, 1<<16)
		n, err := unix.Llistxattr(path, names)
		check(t, err)
		list := strings.FieldsFunc(string(names[:n]), func(c rune) bool { return c == 0 })
		slices.Sort(list)
		for _, name := range list {
			value := make([]byte, 1<<16)
			n, err := unix.Lgetxattr(path, name, value)
			check(t, err)
			line += " xattr." + string(mtree.AppendVis(nil, name)) + "=" + base64.StdEncoding.EncodeToString(value[:n])
		}
		b.WriteString(line + "\n")
		return nil
	}))
	return packText(t, b.String())
}

// everywhere calls fn for every entry of a tree.
func everywhere(root string, fn func(path string) error) error {
	return filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return fn(path)
	})
}

func stamp(name, value string) func(string) error {
	return func(path string) error {
		err := unix.Lsetxattr(path, name, []byte(value), 0)
		if errors.Is(err, unix.EPERM) { // user.* on what is neither a file nor a directory
			err = nil
		}
		return err
	}
}

// attributed is everyKind with what a layer's tar and a machine give to files.
func attributed(t testing.TB) string {
	t.Helper()
	root := everyKind(t)
	check(t, os.Mkdir(root+"/equal", 0o755))
	for i := range 10 {
		check(t, os.WriteFile(fmt.Sprintf("%s/equal/%d", root, i), []byte("equal"), 0o644))
	}
	check(t, everywhere(root, stamp("security.selinux", "system_u:object_r:container_share_t:s0\x00")))
	check(t, unix.Setxattr(root+"/file", "security.capability", []byte(capability), 0))
	check(t, unix.Setxattr(root+"/dir/sub/file", "system.posix_acl_access", []byte(acl(0o4755)), 0))
	check(t, unix.Setxattr(root+"/file", "security.ima", []byte("\x04\x04signature"), 0))
	still(t, root)
	return root
}

// harmless are events in the life of a node after which a layer means what it
// meant. They return where the tree is afterwards.
var harmless = map[string]func(t testing.TB, root string) string{
	"labels changed": func(t testing.TB, root string) string {
		check(t, everywhere(root, stamp("security.selinux", "system_u:object_r:container_ro_file_t:s0\x00")))
		return root
	},
	"labels removed": func(t testing.TB, root string) string {
		check(t, everywhere(root, func(path string) error {
			err := unix.Lremovexattr(path, "security.selinux")
			if errors.Is(err, unix.ENODATA) { // by another name of the file
				err = nil
			}
			return err
		}))
		return root
	},
	"other security modules": func(t testing.TB, root string) string {
		for _, name := range []string{"security.SMACK64", "security.apparmor", "security.evm"} {
			if err := unix.Lsetxattr(root+"/file", name, []byte("x"), 0); err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EINVAL) {
				t.Fatal(name, err)
			}
		}
		check(t, unix.Setxattr(root+"/file", "security.ima", []byte("\x04\x04other key"), 0))
		check(t, unix.Setxattr(root+"/dir/file", "security.ima", []byte("\x01hash"), 0))
		return root
	},
	"cp -al": func(t testing.TB, root string) string {
		run(t, "cp", "-al", root, root+".backup")
		t.Cleanup(func() { check(t, os.RemoveAll(root+".backup")) })
		return root
	},
	"rsync --link-dest": func(t testing.TB, root string) string {
		run(t, "rsync", "-aHAX", "--link-dest="+root, root+"/", root+".backup/")
		t.Cleanup(func() { check(t, os.RemoveAll(root+".backup")) })
		return root
	},
	"hardlink": func(t testing.TB, root string) string {
		run(t, "hardlink", root)
		var st unix.Stat_t
		check(t, unix.Stat(root+"/equal/1", &st))
		if st.Nlink < 10 {
			t.Errorf("hardlink(1) made only %d links", st.Nlink)
		}
		return root
	},
	"temporary names": func(t testing.TB, root string) string { // of e4defrag, xfs_fsr, rdfind
		for _, dir := range []string{root, root + "/dir", root + "/empty"} {
			check(t, os.WriteFile(dir+"/.tmp", nil, 0o600))
			check(t, os.Remove(dir+"/.tmp"))
		}
		return root
	},
	"stamps of scanners": func(t testing.TB, root string) string {
		check(t, everywhere(root, stamp("user.xdg.origin.url", "x")))
		check(t, everywhere(root, stamp("user.shatag.sha256", strings.Repeat("0", 64))))
		check(t, everywhere(root, stamp("trusted.glusterfs.volume-id", "x")))
		return root
	},
	"overlayfs": func(t testing.TB, root string) string {
		for _, name := range []string{"origin", "impure", "nlink", "uuid"} {
			check(t, unix.Setxattr(root+"/dir", "trusted.overlay."+name, []byte("y"), 0))
		}
		return root
	},
	"reading": func(t testing.TB, root string) string {
		run(t, "grep", "-r", "--devices=skip", "content", root)
		check(t, everywhere(root, func(path string) error {
			return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_OMIT}}, unix.AT_SYMLINK_NOFOLLOW)
		}))
		return root
	},
	"chattr": func(t testing.TB, root string) string {
		run(t, "chattr", "+iA", root+"/file")
		t.Cleanup(func() { run(t, "chattr", "-iA", root+"/file") })
		return root
	},
	"GNU tar": func(t testing.TB, root string) string { // whole seconds
		to := t.TempDir()
		tar := filepath.Join(t.TempDir(), "tar")
		run(t, "tar", "--format=gnu", "--numeric-owner", "-C", root, "-cf", tar, ".")
		run(t, "tar", "--numeric-owner", "-C", to, "-xpf", tar)
		copyAttributes(t, root, to)
		return to
	},
	"rsync without -H": func(t testing.TB, root string) string {
		to := t.TempDir()
		run(t, "rsync", "-aAX", "--numeric-ids", root+"/", to+"/")
		copyAttributes(t, root, to) // it leaves out those of overlayfs
		return to
	},
	"cp -a to xfs": func(t testing.TB, root string) string {
		to := formatted(t, "xfs", 512<<20) + "/fs"
		run(t, "cp", "-a", root, to)
		return to
	},
}

// copyAttributes is for tools that can keep attributes in another format only.
func copyAttributes(t testing.TB, from, to string) {
	t.Helper()
	check(t, everywhere(from, func(path string) error {
		rel, err := filepath.Rel(from, path)
		check(t, err)
		e, err := Read(path, rel)
		check(t, err)
		for _, x := range e.Xattrs {
			if err := unix.Lsetxattr(filepath.Join(to, rel), x.Name, []byte(x.Value), 0); err != nil {
				return fmt.Errorf("%s %s: %w", rel, x.Name, err)
			}
		}
		return nil
	}))
}

// TestHarmless: no finding after any of the events, by new seals and by those of
// earlier versions.
func TestHarmless(t *testing.T) {
	for name, event := range harmless {
		t.Run(name, func(t *testing.T) {
			root := attributed(t)
			path, s := sealOf(t, root)
			before, beforeDigest := sealBefore(t, root)
			list, contentsDigest := contentsOf(t, root)
			root = event(t, root)
			for _, c := range []struct{ what, path, digest string }{{"new", path, s.Digest}, {"earlier", before, beforeDigest}} {
				if found, err := Verify(t.Context(), root, c.path, c.digest, 5); err != nil || len(found) > 0 {
					t.Errorf("%s seal: found %v, error %v", c.what, found, err)
				}
			}
			if found, err := contents.Verify(t.Context(), root, list, contentsDigest, 5, contents.Reading{}); err != nil || len(found) > 0 {
				t.Errorf("contents: found %v, error %v", found, err)
			}
		})
	}
}

// TestHarmlessOfXFS: xfs shows access control lists by a second name that other
// file systems do not have.
func TestHarmlessOfXFS(t *testing.T) {
	root := formatted(t, "xfs", 512<<20) + "/fs"
	check(t, os.Mkdir(root, 0o755))
	check(t, os.WriteFile(root+"/file", nil, 0o644))
	check(t, unix.Setxattr(root+"/file", "system.posix_acl_access", []byte(acl(0o644)), 0))
	path, s := sealOf(t, root)
	before, digest := sealBefore(t, root)
	if !strings.Contains(text(t, before), "trusted.SGI_ACL_FILE") {
		t.Error("this xfs shows no second name")
	}
	to := t.TempDir() + "/fs"
	run(t, "cp", "-a", root, to)
	if err := unix.Lremovexattr(to+"/file", "trusted.SGI_ACL_FILE"); err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOTSUP) {
		t.Fatal(err)
	}
	for path, digest := range map[string]string{path: s.Digest, before: digest} {
		if found, err := Verify(t.Context(), to, path, digest, 5); err != nil || len(found) > 0 {
			t.Errorf("found %v, error %v", found, err)
		}
	}
}

// TestEarlierSeals: seals of earlier versions find what they found, and their
// long values are compared with digests.
func TestEarlierSeals(t *testing.T) {
	for want, change := range map[string]func(root string) error{
		"":                                      func(string) error { return nil },
		"hard: missing":                         func(r string) error { return os.Remove(r + "/hard") },
		"file: size was 7, is 0":                func(r string) error { return os.Truncate(r+"/file", 0) },
		"dir/sub/file: mode was 04755, is 0755": func(r string) error { return os.Chmod(r+"/dir/sub/file", 0o755) },
		"dir/sub/file: xattr.user.long was sha256:" + sumOf("a", 2000) + ", is sha256:" + sumOf("b", 3000): func(r string) error {
			return unix.Setxattr(r+"/dir/sub/file", "user.long", []byte(strings.Repeat("b", 3000)), 0)
		},
	} {
		root := everyKind(t)
		path, digest := sealBefore(t, root)
		check(t, change(root))
		still(t, root)
		found, err := Verify(t.Context(), root, path, digest, 5)
		if err != nil || join(found) != want {
			t.Errorf("found %v, error %v, want %q", found, err, want)
		}
	}
}

// TestRelabelMeanwhile: attributes that come and go while a tree is read are no
// media errors, although getxattr(2) answers ENODATA.
func TestRelabelMeanwhile(t *testing.T) {
	root := everyKind(t)
	path, s := sealOf(t, root)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Lsetxattr(root+"/many/7", "user.stamp", []byte("x"), 0)
				_ = unix.Lremovexattr(root+"/many/7", "user.stamp")
			}
		}
	}()
	defer func() { close(stop); <-done }()
	for range 2000 {
		if _, err := Read(root+"/many/7", "many/7"); tree.Unreadable(err) {
			t.Fatalf("an attribute that is gone is a media error: %v", err)
		}
	}
	if found, err := Verify(t.Context(), root, path, s.Digest, 5); tree.Unreadable(err) || len(found) > 0 {
		t.Errorf("found %v, error %v", found, err)
	}
}

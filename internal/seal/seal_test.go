package seal

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	cfs "github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
)

// sealOf seals a tree and returns where, and the summary.
func sealOf(t testing.TB, root string) (string, Summary) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "seal")
	s, err := Write(context.Background(), root, path)
	check(t, err)
	return path, s
}

// capability is a value of security.capability: cap_chown=ep (linux/capability.h,
// struct vfs_cap_data).
const capability = "\x01\x00\x00\x02\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// acl is an access control list of a file with this mode that gives the user 7
// the right to read (linux/posix_acl_xattr.h).
func acl(mode uint16) string {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, mode >> 6 & 7, 1<<32 - 1}, {2, 4, 7}, {4, mode >> 3 & 7, 1<<32 - 1}, {16, mode >> 3 & 7, 1<<32 - 1}, {32, mode & 7, 1<<32 - 1}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return string(b)
}

func sumOf(s string, n int) string {
	return fmt.Sprintf("%x", sha256.Sum256([]byte(strings.Repeat(s, n))))
}

func TestOrderAndCount(t *testing.T) {
	root := everyKind(t)
	path, s := sealOf(t, root)
	var want []string
	check(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		rel, e := filepath.Rel(root, path)
		want = append(want, rel)
		return errors.Join(err, e)
	}))
	var got []string
	for line := range strings.Lines(text(t, path)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		p, err := mtree.PathOf([]byte(line))
		check(t, err)
		got = append(got, p)
	}
	if !slices.Equal(got, want) {
		t.Errorf("%d paths %q, want %d as filepath.WalkDir has them", len(got), got[:10], len(want))
	}
	if !slices.IsSortedFunc(got, mtree.ComparePaths) {
		t.Error("ComparePaths does not know this order")
	}
	usage, err := cfs.DiskUsage(t.Context(), root)
	check(t, err)
	if s.Inodes != usage.Inodes || s.Blocks != usage.Size {
		t.Errorf("%d inodes, %d bytes on disk; containerd counts %+v", s.Inodes, s.Blocks, usage)
	}
	if s.Entries != int64(len(want)) || s.Bytes != 9*7 {
		t.Errorf("%d entries, %d bytes", s.Entries, s.Bytes)
	}
	if again, err := Write(t.Context(), root, path+".again"); err != nil || again != s {
		t.Errorf("a second walk finds %+v, the first %+v; %v", again, s, err)
	}
}

// TestMtree has an independent program check a tree against its seal.
func TestMtree(t *testing.T) {
	mtree, err := exec.LookPath("mtree")
	if err != nil {
		t.Skip("no mtree: apt-get install mtree-netbsd")
	}
	root := everyKind(t)
	path, _ := sealOf(t, root)
	// The one keyword that it does not know.
	spec := filepath.Join(t.TempDir(), "spec")
	check(t, os.WriteFile(spec, []byte(regexp.MustCompile(` xattr\S+`).ReplaceAllString(text(t, path), "")), 0o600))
	run := func() (string, error) {
		out, err := exec.CommandContext(t.Context(), mtree, "-f", spec, "-p", root).CombinedOutput()
		return string(out), err
	}
	if out, err := run(); err != nil || strings.TrimSpace(out) != "" {
		t.Fatalf("mtree finds differences: %v\n%s", err, out)
	}
	check(t, unix.Chmod(filepath.Join(root, "dir/sub/file"), 0o755))
	check(t, os.Remove(filepath.Join(root, "日本")))
	out, err := run()
	if err == nil || !strings.Contains(out, "dir/sub/file") || !strings.Contains(out, "missing") {
		t.Errorf("mtree does not read what the seal has: %v\n%s", err, out)
	}
}

func TestVerify(t *testing.T) {
	for name, c := range map[string]struct {
		change func(root string) error
		want   string
	}{
		"nothing":            {func(string) error { return nil }, ""},
		"file removed":       {func(r string) error { return os.Remove(r + "/many/599") }, "many/599: missing"},
		"first removed":      {func(r string) error { return os.Remove(r + "/ odd \n#=*?[\\\"") }, " odd \n#=*?[\\\": missing"},
		"last removed":       {func(r string) error { return os.Remove(r + "/\xff\xfe") }, "\xff\xfe: missing"},
		"directory removed":  {func(r string) error { return os.RemoveAll(r + "/dir/sub") }, "dir/sub: missing dir/sub/file: missing"},
		"root removed":       {os.RemoveAll, ".: missing"},
		"file added":         {func(r string) error { return os.WriteFile(r+"/dir/new", nil, 0o600) }, "dir/new: extra"},
		"last added":         {func(r string) error { return os.WriteFile(r+"/\xff\xff", nil, 0o600) }, "\xff\xff: extra"},
		"truncated":          {func(r string) error { return os.Truncate(r+"/file", 0) }, "file: size was 7, is 0"},
		"mode":               {func(r string) error { return unix.Chmod(r+"/file", 0o600) }, "file: mode was 0644, is 0600"},
		"setuid dropped":     {func(r string) error { return unix.Chmod(r+"/dir/sub/file", 0o755) }, "dir/sub/file: mode was 04755, is 0755"},
		"owner":              {func(r string) error { return os.Lchown(r+"/file", 0, 4_000_000) }, "file: uid was 1234, is 0"},
		"group of a symlink": {func(r string) error { return os.Lchown(r+"/soft", 0, 7) }, "soft: gid was 0, is 7"},
		"whiteout removed":   {func(r string) error { return os.Remove(r + "/whiteout") }, "whiteout: missing"},
		"whiteout replaced":  {func(r string) error { return errors.Join(os.Remove(r+"/whiteout"), os.Mkdir(r+"/whiteout", 0)) }, "whiteout: type was char, is dir"},
		"device": {func(r string) error {
			return errors.Join(os.Remove(r+"/device"), unix.Mknod(r+"/device", unix.S_IFBLK|0o640, 0))
		}, "device: device was native,240,200000, is native,0,0"},
		"symlink retargeted": {func(r string) error { return errors.Join(os.Remove(r+"/soft"), os.Symlink("x", r+"/soft")) }, `soft: link was dir/file\040with\040space\134, is x`},
		"opaque dropped":     {func(r string) error { return unix.Removexattr(r+"/dir", "trusted.overlay.opaque") }, `dir: xattr.trusted.overlay.opaque was "y", is none`},
		"xattr changed":      {func(r string) error { return unix.Setxattr(r+"/file", "user.odd name=", nil, 0) }, `file: xattr.user.odd name= was "\x00\xff binary", is ""`},
		"xattr removed":      {func(r string) error { return unix.Removexattr(r+"/file", "user.odd name=") }, `file: xattr.user.odd name= was "\x00\xff binary", is none`},
		"long xattr changed": {func(r string) error {
			return unix.Setxattr(r+"/dir/sub/file", "user.long", []byte(strings.Repeat("b", 2000)), 0)
		},
			"dir/sub/file: xattr.user.long was sha256:" + sumOf("a", 2000) + ", is sha256:" + sumOf("b", 2000)},
		"long xattr cut": {func(r string) error { return unix.Setxattr(r+"/dir/sub/file", "user.long", []byte("aa"), 0) },
			"dir/sub/file: xattr.user.long was sha256:" + sumOf("a", 2000) + `, is "aa"`},
		"opaque added":       {func(r string) error { return unix.Setxattr(r+"/empty", "trusted.overlay.opaque", []byte("y"), 0) }, `empty: xattr.trusted.overlay.opaque was none, is "y"`},
		"other opaque added": {func(r string) error { return unix.Setxattr(r+"/empty", "user.overlay.opaque", []byte("y"), 0) }, `empty: xattr.user.overlay.opaque was none, is "y"`},
		"capability added": {func(r string) error { return unix.Setxattr(r+"/file", "security.capability", []byte(capability), 0) },
			"file: xattr.security.capability was none, is " + strconv.Quote(capability)},
		"access control list added": {func(r string) error {
			return unix.Setxattr(r+"/dir/sub/file", "system.posix_acl_access", []byte(acl(0o4755)), 0)
		},
			"dir/sub/file: xattr.system.posix_acl_access was none, is " + strconv.Quote(acl(0o4755))},
		"kernel's own xattrs": {func(r string) error { return unix.Setxattr(r+"/dir", "trusted.overlay.origin", []byte("1"), 0) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			root := everyKind(t)
			path, s := sealOf(t, root)
			check(t, c.change(root))
			if name != "root removed" {
				still(t, root)
			}
			found, err := Verify(t.Context(), root, path, s.Digest, 10)
			check(t, err)
			var got []string
			for _, f := range found {
				got = append(got, f.String())
			}
			if strings.Join(got, " ") != c.want {
				t.Errorf("found %q, want %q", got, c.want)
			}
		})
	}
	t.Run("time", func(t *testing.T) {
		root := everyKind(t)
		path, s := sealOf(t, root)
		check(t, unix.UtimesNanoAt(unix.AT_FDCWD, root+"/file", []unix.Timespec{{}, {Sec: 2, Nsec: 5}}, 0))
		found, err := Verify(t.Context(), root, path, s.Digest, 10)
		check(t, err)
		if len(found) != 1 || found[0].String() != "file: time was 1.000000005, is 2.000000005" {
			t.Errorf("found %v", found)
		}
	})
	t.Run("limit", func(t *testing.T) {
		root := everyKind(t)
		path, s := sealOf(t, root)
		check(t, os.RemoveAll(root+"/many"))
		if found, err := Verify(t.Context(), root, path, s.Digest, 3); err != nil || len(found) != 3 {
			t.Errorf("%d findings, %v", len(found), err)
		}
	})
}

// header is the first line of a seal.
const header = "#mtree v2.0\n"

// TestBrokenSeal: a seal that is not the one that was written is no evidence against
// the tree.
func TestBrokenSeal(t *testing.T) {
	root := everyKind(t)
	path, s := sealOf(t, root)
	good, err := os.ReadFile(path)
	check(t, err)
	repacked := func(text string) []byte {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, err := io.WriteString(w, text)
		check(t, errors.Join(err, w.Close()))
		return b.Bytes()
	}
	whole := text(t, path)
	for name, bad := range map[string][]byte{
		"missing":     nil,
		"empty":       {},
		"garbage":     []byte("garbage"),
		"cut short":   good[:len(good)/2],
		"flipped":     flip(good, len(good)/2),
		"line gone":   repacked(strings.Replace(whole, "./file ", "./f ", 1)),
		"no header":   repacked(strings.TrimPrefix(whole, header)),
		"half a line": repacked(whole[:len(whole)-5]),
		"no lines":    repacked(header),
		"odd line":    repacked(header + "\\9\n" + whole),
	} {
		t.Run(name, func(t *testing.T) {
			check(t, os.WriteFile(path, bad, 0o600))
			if name == "missing" {
				check(t, os.Remove(path))
			}
			if found, err := Verify(t.Context(), root, path, s.Digest, 1000); !errors.Is(err, mtree.ErrUnsealed) {
				t.Errorf("findings %v, error %v", found, err)
			}
		})
	}
}

// TestCancel: a walk ends with its context.
func TestCancel(t *testing.T) {
	root := everyKind(t)
	ctx, cancel := context.WithCancel(t.Context())
	n := 0
	err := walk(ctx, root, func(context.Context, string, *Entry) (bool, error) {
		cancel()
		return false, nil
	}, func([]Entry, []byte) error { n++; return nil })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v after %d batches", err, n)
	}
}

func TestChange(t *testing.T) {
	root := everyKind(t)
	stop := errors.New("stop")
	for _, rel := range []string{".", "dir/sub", "many/300"} {
		err := walk(t.Context(), root, func(_ context.Context, _ string, e *Entry) (bool, error) {
			if e.Path == rel {
				return false, stop
			}
			return false, nil
		}, func([]Entry, []byte) error { return nil })
		if !errors.Is(err, stop) {
			t.Errorf("change of %s: %v", rel, err)
		}
	}
	// What is changed is what is sealed, and what is added to the root is
	// visited.
	err := walk(t.Context(), root, func(_ context.Context, path string, e *Entry) (bool, error) {
		switch e.Path {
		case ".":
			return true, os.WriteFile(filepath.Join(path, "added"), nil, 0o600)
		case "added":
			return true, os.Chmod(path, 0o640)
		}
		return false, nil
	}, func(entries []Entry, lines []byte) error {
		if bytes.Contains(lines, []byte("./added ")) && !bytes.Contains(lines, []byte("./added type=file mode=0640 ")) {
			t.Errorf("sealed as it was before")
		}
		return nil
	})
	check(t, err)
}

package tree

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

// deepVar makes the test binary remove the tree that it names, with few
// descriptors.
const deepVar = "TREE_REMOVE"

func TestMain(m *testing.M) {
	if path := os.Getenv(deepVar); path != "" {
		limit := unix.Rlimit{Cur: 64, Max: 64}
		err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
		if err == nil {
			err = Remove(context.Background(), path)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	treetest.Main(m)
}

func fatal(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mkdirDeep makes a chain of directories of any depth, each with a file beside
// the next one.
func mkdirDeep(t *testing.T, top string, depth int) {
	t.Helper()
	fatal(t, os.Mkdir(top, 0o755))
	fd, err := unix.Open(top, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	fatal(t, err)
	for i := range depth {
		fatal(t, unix.Mkdirat(fd, "d", 0o755))
		if i%100 == 0 {
			for j := range 3 {
				file, err := unix.Openat(fd, "file"+strconv.Itoa(j), unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
				fatal(t, err)
				fatal(t, unix.Close(file))
			}
		}
		next, err := unix.Openat(fd, "d", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		fatal(t, err)
		fatal(t, unix.Close(fd))
		fd = next
	}
	fatal(t, unix.Close(fd))
}

// inMemory is a temporary directory on tmpfs, where there is one: what is tested
// is the way through the tree, not the disk.
func inMemory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "tree-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { fatal(t, Remove(context.Background(), dir)) })
	return dir
}

// TestDeep removes what a container can make: a path far longer than PATH_MAX.
// os.RemoveAll needs a descriptor for each level.
func TestDeep(t *testing.T) {
	top := filepath.Join(inMemory(t), "top")
	mkdirDeep(t, top, 60_000)
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), deepVar+"="+top)
	began := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	t.Logf("60,000 levels in %v", time.Since(began))
	if _, err := os.Lstat(top); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
}

// host makes a directory with content that must outlive every removal.
func host(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	fatal(t, os.MkdirAll(filepath.Join(dir, "sub"), 0o755))
	fatal(t, os.WriteFile(filepath.Join(dir, "sub", "precious"), []byte("x"), 0o600))
	return dir
}

func bind(t *testing.T, from, to string) {
	t.Helper()
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		t.Skip("mounting needs root: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(to, unix.MNT_DETACH) })
}

// TestMountsStay removes trees with mounts in them, with openat2 and without.
func TestMountsStay(t *testing.T) {
	for _, old := range []bool{false, true} {
		t.Run(fmt.Sprint("old kernel=", old), func(t *testing.T) {
			noOpenat2.Store(old)
			t.Cleanup(func() { noOpenat2.Store(false) })
			precious := host(t)
			top := filepath.Join(t.TempDir(), "top")
			for _, dir := range []string{"a/b/mnt", "a/c/d", "mnt2", "z"} {
				fatal(t, os.MkdirAll(filepath.Join(top, dir), 0o755))
			}
			for _, file := range []string{"a/file", "a/b/file", "a/c/d/file", "a/b/mounted", "z/file"} {
				fatal(t, os.WriteFile(filepath.Join(top, file), []byte("x"), 0o600))
			}
			bind(t, precious, filepath.Join(top, "a/b/mnt"))
			bind(t, filepath.Join(precious, "sub"), filepath.Join(top, "mnt2"))
			bind(t, filepath.Join(precious, "sub", "precious"), filepath.Join(top, "a/b/mounted"))

			err := Remove(t.Context(), top)
			left := (*LeftError)(nil)
			if !errors.As(err, &left) || left.Entries != 3 || len(left.Mounts) != 3 || left.Err != nil {
				t.Fatalf("got %v (%+v)", err, left)
			}
			for _, mount := range []string{"a/b/mnt", "a/b/mounted", "mnt2"} {
				if !strings.Contains(fmt.Sprint(left.Mounts), mount) {
					t.Errorf("%q does not name %s", left.Mounts, mount)
				}
			}
			if _, err := os.Stat(filepath.Join(precious, "sub", "precious")); err != nil {
				t.Errorf("what was mounted is gone: %v", err)
			}
			for _, gone := range []string{"a/file", "a/b/file", "a/c", "z"} {
				if _, err := os.Lstat(filepath.Join(top, gone)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s was left: %v", gone, err)
				}
			}
			if err := Remove(t.Context(), filepath.Join(top, "mnt2")); !errors.As(err, &left) || left.Mounts[0] != "." {
				t.Errorf("the top is a mount point: %v", err)
			}
			for _, mount := range []string{"a/b/mnt", "a/b/mounted", "mnt2"} {
				fatal(t, unix.Unmount(filepath.Join(top, mount), 0))
			}
			fatal(t, Remove(t.Context(), top))
			if _, err := os.Lstat(top); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("left after the unmount: %v", err)
			}
			if _, err := os.Stat(filepath.Join(precious, "sub", "precious")); err != nil {
				t.Errorf("what was mounted is gone: %v", err)
			}
		})
	}
}

// TestDeepMountStays has the mount below directories that had to be closed.
func TestDeepMountStays(t *testing.T) {
	precious := host(t)
	top := filepath.Join(t.TempDir(), "top")
	deep := filepath.Join(top, strings.Repeat("d/", 200))
	fatal(t, os.MkdirAll(filepath.Join(deep, "mnt"), 0o755))
	for i := range 200 {
		dir := filepath.Join(top, strings.Repeat("d/", i))
		fatal(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
		fatal(t, os.Mkdir(filepath.Join(dir, "z"), 0o700))
	}
	bind(t, precious, filepath.Join(deep, "mnt"))
	left := (*LeftError)(nil)
	if err := Remove(t.Context(), top); !errors.As(err, &left) || left.Entries != 1 {
		t.Fatalf("got %v", err)
	}
	n := 0
	fatal(t, filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
		if n++; d != nil && d.Name() == "mnt" {
			return filepath.SkipDir
		}
		return err
	}))
	if n != 202 {
		t.Errorf("%d directories are left, want the 202 down to the mount", n)
	}
	if _, err := os.Stat(filepath.Join(precious, "sub", "precious")); err != nil {
		t.Errorf("what was mounted is gone: %v", err)
	}
}

// TestMountAppears mounts a directory again and again in a tree that is being
// deleted.
func TestMountAppears(t *testing.T) {
	precious := host(t)
	bind(t, precious, t.TempDir()) // or skip
	for range 5 {
		top := filepath.Join(inMemory(t), "top")
		for i := range 300 {
			fatal(t, os.MkdirAll(filepath.Join(top, fmt.Sprint("d", i), "mnt"), 0o755))
		}
		mounted := make(chan []string)
		go func() {
			var points []string
			for i := range 300 {
				point := filepath.Join(top, fmt.Sprint("d", i), "mnt")
				if unix.Mount(precious, point, "", unix.MS_BIND, "") == nil {
					points = append(points, point)
				}
			}
			mounted <- points
		}()
		err := Remove(t.Context(), top)
		points := <-mounted
		if _, lost := os.Stat(filepath.Join(precious, "sub", "precious")); lost != nil {
			t.Fatalf("deleted through a mount: %v (%v)", lost, err)
		}
		for _, point := range points {
			fatal(t, unix.Unmount(point, unix.MNT_DETACH))
		}
		fatal(t, Remove(t.Context(), top))
	}
}

// TestImmutableStays: what the kernel does not delete is named, and everything
// else goes.
func TestImmutableStays(t *testing.T) {
	top := filepath.Join(t.TempDir(), "top")
	fatal(t, os.MkdirAll(filepath.Join(top, "dir"), 0o755))
	for i := range 1000 {
		fatal(t, os.WriteFile(filepath.Join(top, fmt.Sprint("f", i)), nil, 0o600))
	}
	file := filepath.Join(top, "dir", "immutable")
	fatal(t, os.WriteFile(file, nil, 0o600))
	if out, err := exec.Command("chattr", "+i", file).CombinedOutput(); err != nil {
		t.Skipf("chattr: %v: %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("chattr", "-i", file).Run() })
	left := (*LeftError)(nil)
	err := Remove(t.Context(), top)
	if !errors.As(err, &left) || !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "dir/immutable") || left.Entries != 1 {
		t.Errorf("got %v", err)
	}
	if names, err := os.ReadDir(top); err != nil || len(names) != 1 {
		t.Errorf("left %v, %v", names, err)
	}
	fatal(t, exec.Command("chattr", "-i", file).Run())
	fatal(t, Remove(t.Context(), top))
}

// TestStops: a removal of a large tree ends with its context, and another goes
// on with the rest.
func TestStops(t *testing.T) {
	top := filepath.Join(inMemory(t), "top")
	for i := range 50 {
		dir := filepath.Join(top, fmt.Sprint(i))
		fatal(t, os.MkdirAll(dir, 0o755))
		for j := range 400 {
			fatal(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(j)), nil, 0o600))
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	if err := Remove(ctx, top); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	if _, err := os.Lstat(top); err != nil {
		t.Fatal(err)
	}
	fatal(t, Remove(t.Context(), top))
	fatal(t, Remove(t.Context(), top)) // what is not there is no error
}

// TestNotATree removes single entries, and follows no link.
func TestNotATree(t *testing.T) {
	precious := host(t)
	dir := t.TempDir()
	link, file := filepath.Join(dir, "link"), filepath.Join(dir, "file")
	fatal(t, os.Symlink(precious, link))
	fatal(t, os.WriteFile(file, nil, 0))
	fatal(t, Remove(t.Context(), link))
	fatal(t, Remove(t.Context(), file))
	if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
		t.Errorf("left %v, %v", names, err)
	}
	if _, err := os.Stat(filepath.Join(precious, "sub", "precious")); err != nil {
		t.Error(err)
	}
}

// TestDescriptors counts the descriptors that are open at once.
func TestDescriptors(t *testing.T) {
	top := filepath.Join(inMemory(t), "top")
	mkdirDeep(t, top, 1000)
	r := remover{ctx: t.Context(), top: "top", left: map[int]map[string]bool{}}
	parent, err := os.Open(filepath.Dir(top))
	fatal(t, err)
	defer parent.Close()
	fatal(t, r.entry(parent, "top"))
	for range 500 {
		fatal(t, r.entry(r.levels[len(r.levels)-1].dir.f, "d"))
		if r.opened > maxOpen {
			t.Fatalf("%d are open", r.opened)
		}
	}
	r.closeAll()
	fatal(t, Remove(t.Context(), top))
}

func TestSameMount(t *testing.T) {
	dir := t.TempDir()
	other := filepath.Join(dir, "other")
	fatal(t, os.Mkdir(other, 0o700))
	if same, err := SameMount(dir, other); err != nil || !same {
		t.Errorf("%v, %v", same, err)
	}
	bind(t, dir, other) // the same file system, and rename(2) returns EXDEV
	if same, err := SameMount(dir, other); err != nil || same {
		t.Errorf("a bind mount of its own: %v, %v", same, err)
	}
	if _, err := SameMount(dir, filepath.Join(dir, "missing")); err == nil {
		t.Error("nothing is on no mount")
	}
}

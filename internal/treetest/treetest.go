// Package treetest has what the tests of several packages need to make directory trees of
// every kind, file systems for them, and damage in them. Only tests import it.
package treetest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Check ends the test when there is an error.
func Check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// EveryKind makes a tree with every kind of entry, odd names and odd bits, and
// more entries than fit into a batch.
func EveryKind(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("devices and owners need root")
	}
	root := t.TempDir()
	at := func(rel string) string { return filepath.Join(root, rel) }
	for _, dir := range []string{"dir", "dir/sub", "dir.d", "empty", "many"} {
		Check(t, os.Mkdir(at(dir), 0o755))
	}
	for i := range 600 {
		Check(t, os.WriteFile(at(fmt.Sprintf("many/%d", i)), nil, 0o600))
	}
	for _, name := range []string{"file", "dir/file", "dir/sub/file", "dir-", " odd \n#=*?[\\\"", "日本", "\xff\xfe", "-dash", strings.Repeat("n", 255)} {
		Check(t, os.WriteFile(at(name), []byte("content"), 0o644))
	}
	Check(t, os.Link(at("dir/file"), at("hard")))
	Check(t, os.Symlink("dir/file with space\\", at("soft")))
	Check(t, unix.Mknod(at("whiteout"), unix.S_IFCHR, 0))
	Check(t, unix.Mknod(at("device"), unix.S_IFBLK|0o640, int(unix.Mkdev(240, 200_000))))
	Check(t, unix.Mkfifo(at("pipe"), 0o622))
	Check(t, os.Lchown(at("file"), 1234, 4_000_000))
	Check(t, unix.Chmod(at("dir/sub/file"), 0o4755))
	Check(t, unix.Chmod(at("empty"), 0o1777))
	Check(t, unix.Setxattr(at("dir"), "trusted.overlay.opaque", []byte("y"), 0))
	Check(t, unix.Setxattr(at("file"), "user.odd name=", []byte("\x00\xff binary"), 0))
	Check(t, unix.Setxattr(at("dir/sub/file"), "user.long", bytes.Repeat([]byte("a"), 2000), 0))
	Still(t, root)
	return root
}

// WithContent is EveryKind with files of more sizes.
func WithContent(t testing.TB) string {
	t.Helper()
	const chunk = 1 << 20 // how much is read at a time
	root := EveryKind(t)
	for name, size := range map[string]int{"one": 1, "page": 4096, "chunk": chunk, "chunk and a bit": chunk + 1, "big": 3*chunk + 4097} {
		b := make([]byte, size)
		for i := range b {
			b[i] = byte(i*7 + i>>8)
		}
		Check(t, os.WriteFile(filepath.Join(root, "dir", name), b, 0o640))
	}
	Check(t, os.Link(root+"/dir/big", root+"/dir/sub/big too"))
	Still(t, root)
	return root
}

// Still gives every entry the same times, so that a change shows by itself and
// not by the times it moved.
func Still(t testing.TB, root string) {
	t.Helper()
	Check(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{{Sec: 1}, {Sec: 1, Nsec: 5}}, unix.AT_SYMLINK_NOFOLLOW)
	}))
}

// Run runs a program, and skips the test when it is not installed.
func Run(t testing.TB, name string, args ...string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("no %s", name)
	}
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
}

// Formatted makes a file system of its own on a loop device.
func Formatted(t testing.TB, kind string, size int64, mkfs ...string) string {
	t.Helper()
	if _, err := exec.LookPath("mkfs." + kind); err != nil || os.Geteuid() != 0 {
		t.Skipf("needs root and mkfs.%s", kind)
	}
	dir := t.TempDir()
	image, mnt := dir+"/disk", dir+"/mnt"
	Check(t, os.WriteFile(image, nil, 0o600))
	Check(t, os.Truncate(image, size))
	Check(t, os.Mkdir(mnt, 0o755))
	Run(t, "mkfs."+kind, append(mkfs, "-q", image)...)
	Run(t, "mount", "-o", "loop", image, mnt)
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Errorf("unmount %s: %v", mnt, err)
		}
	})
	return mnt
}

// WithoutDescriptors calls fn while no file can be opened: EMFILE.
func WithoutDescriptors(t *testing.T, fn func()) {
	t.Helper()
	var before unix.Rlimit
	Check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &before))
	Check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: before.Max}))
	defer func() { Check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &before)) }()
	fn()
}

// Main runs the tests of a package in a mount namespace of their own, so that no mount
// and no loop device outlives them, however they end. Call it in TestMain.
func Main(m *testing.M) {
	const inside = "TREETEST_NAMESPACE"
	if os.Geteuid() != 0 || os.Getenv(inside) != "" {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inside+"=1")
	// With Unshareflags, package syscall makes all mounts private.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		os.Exit(max(exit.ExitCode(), 1))
	}
	if err != nil {
		println("run the tests in a mount namespace:", err.Error())
		os.Exit(1)
	}
}

// LoopDisk mounts an ext4 of so many bytes on dir, for the test.
func LoopDisk(t testing.TB, dir string, size int64) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, size)); err != nil {
		t.Fatal(err)
	}
	for _, argv := range [][]string{{"mkfs.ext4", "-q", "-F", image}, {"mount", "-o", "loop", image, dir}} {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			t.Skipf("%v: %v: %s", argv, err, out)
		}
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, 0) })
}

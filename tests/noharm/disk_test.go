package noharm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// The events here happen while containerd, daemon and container do not run.

// fsck unmounts the disk and has it checked.
func fsck(t testing.TB, n *node) func() {
	n.unmount(t)
	check := map[string][]string{
		"ext4":  {"sh", "-c", "e2fsck -f -y " + n.device + "; test $? -le 1"},
		"xfs":   {"xfs_repair", n.device},
		"btrfs": {"btrfs", "check", n.device},
	}[n.fs]
	// They open the device exclusively. A mount namespace of another test that was made
	// meanwhile keeps it busy until it ends.
	waitFor(t, time.Minute, func() error {
		if out, err := exec.CommandContext(t.Context(), check[0], check[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", check[0], err, out)
		}
		return nil
	})
	n.mount(t)
	return nil
}

// alone starts the daemon and calls it, without containerd, and ends it. It may
// refuse to start.
func (n *node) alone(t testing.TB) {
	t.Helper()
	check(t, kit.NewBoot())
	check(t, n.Daemon.Launch())
	ctx := t.Context()
	for until := time.Now().Add(10 * time.Second); n.Daemon.Running() && time.Now().Before(until); time.Sleep(50 * time.Millisecond) {
		if n.Daemon.Healthy(ctx) == nil {
			break
		}
	}
	if n.Daemon.Running() {
		sn := must[snapshotter](t)(n.Daemon.Snapshotter())
		for range 3 {
			_ = n.statAll(t, sn)
			time.Sleep(200 * time.Millisecond)
		}
		sn.Close()
	}
	for _, args := range [][]string{{"check"}, {"check", "--deep"}, {"repair"}} {
		_, _ = n.results(t, args...)
	}
	check(t, n.Daemon.Kill())
}

// readOnly has the disk read-only for a while.
func readOnly(t testing.TB, n *node) func() {
	command(t, "mount", "-o", "remount,ro", n.dir)
	n.alone(t)
	command(t, "mount", "-o", "remount,rw", n.dir)
	return nil
}

// shutDown has the file system stop while the daemon runs, as it does by itself
// when its journal cannot be written. All calls fail from then on.
func shutDown(t testing.TB, n *node) func() {
	check(t, kit.NewBoot())
	check(t, n.Daemon.Start(t.Context()))
	sn := n.client(t)
	command(t, "sync", "-f", n.dir)
	check(t, disk.Shutdown(n.dir))
	for range 10 {
		_ = n.statAll(t, sn)
		time.Sleep(200 * time.Millisecond)
	}
	for _, args := range [][]string{{"check", "--deep"}, {"repair", "--deep", "--apply"}} {
		_, _ = n.results(t, args...)
	}
	check(t, n.Daemon.Kill())
	n.unmount(t)
	n.mount(t)
	return nil
}

// notMounted starts the daemon when the file system of the snapshots, which was a
// mount of its own, is not mounted: the directory is empty.
func notMounted(t testing.TB, n *node) func() {
	at, real := filepath.Join(n.Daemon.Root, "snapshots"), n.Path("snapshots-of-the-node")
	check(t, os.Rename(at, real))
	check(t, os.Mkdir(at, 0o700))
	command(t, "mount", "--bind", real, at)
	n.alone(t)
	check(t, unix.Unmount(at, 0))
	n.alone(t)
	check(t, os.RemoveAll(at))
	check(t, os.Rename(real, at))
	return nil
}

// migrate copies everything to another disk, which takes the place of the first.
func migrate(to, script string) func(testing.TB, *node) func() {
	return func(t testing.TB, n *node) func() {
		other := kittest.NewDisk(t, kit.DiskOptions{FS: to})
		command(t, "sh", "-ec", script, n.dir, other.Path())
		check(t, other.Unmount())
		n.unmount(t)
		n.fs, n.device = to, other.Device()
		n.mount(t)
		n.inodes = must[map[string]uint64](t)(n.directories())
		// Before the other disk ends.
		t.Cleanup(func() { n.end(t) })
		return nil
	}
}

// blocks returns where a file lies on its disk (FIBMAP of fs/ioctl.c).
func blocks(t testing.TB, path string) (ranges []disk.Range) {
	t.Helper()
	const fibmap, size = 1, 4096
	f := must[*os.File](t)(os.Open(path))
	defer f.Close()
	for page := range (must[os.FileInfo](t)(f.Stat()).Size() + size - 1) / size {
		block := int32(page)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fibmap, uintptr(unsafe.Pointer(&block))); errno != 0 {
			t.Fatalf("find page %d of %s: %v", page, path, errno)
		}
		ranges = append(ranges, disk.Range{Offset: int64(block) * size, Length: size})
	}
	return ranges
}

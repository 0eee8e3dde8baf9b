package kit

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { os.Exit(Main(m.Run)) }

// TestShutdownLosesWhatWasNotSynced shows that the power switch works, and that
// it does not take what a program had made durable.
func TestShutdownLosesWhatWasNotSynced(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			disk, err := NewDisk(t.TempDir(), DiskOptions{FS: fs, Size: 512 << 20})
			if err != nil {
				t.Fatal(err)
			}
			kept, err := os.Create(disk.Path("kept"))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := kept.WriteString("durable"); err != nil {
				t.Fatal(err)
			}
			if err := kept.Sync(); err != nil {
				t.Fatal(err)
			}
			if err := kept.Close(); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(disk.Path("lost"), []byte("not synced"), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := disk.Shutdown(); err != nil {
				t.Fatal(err)
			}
			if err := disk.Remount(); err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(disk.Path("kept")); err != nil || string(b) != "durable" {
				t.Errorf("synced file after the power cut: %q, %v", b, err)
			}
			if b, err := os.ReadFile(disk.Path("lost")); err == nil && len(b) > 0 {
				t.Errorf("unsynced file survived the power cut: %q: the switch does nothing", b)
			}
			device := disk.Device()
			if err := disk.Close(); err != nil {
				t.Fatal(err)
			}
			waitUntil(t, func() bool {
				_, err := os.Stat("/sys/block/" + filepath.Base(device) + "/loop/backing_file")
				return err != nil
			}, device+" is still attached")
		})
	}
}

// TestBtrfsDisk shows the third file system, which has no power switch.
func TestBtrfsDisk(t *testing.T) {
	disk, err := NewDisk(t.TempDir(), DiskOptions{FS: "btrfs", Size: 512 << 20, Mount: "noatime"})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(disk.Path("file"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := disk.Remount(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(disk.Path("file")); err != nil {
		t.Error(err)
	}
	if err := disk.Close(); err != nil {
		t.Error(err)
	}
}

// TestUnmountWaits unmounts a disk that a copy of the mount namespace still holds,
// as it does for a moment when a runtime starts a container.
func TestUnmountWaits(t *testing.T) {
	disk, err := NewDisk(t.TempDir(), DiskOptions{FS: "ext4"})
	if err != nil {
		t.Fatal(err)
	}
	copied := exec.Command("unshare", "--mount", "sh", "-c", "echo; exec sleep 0.5")
	out, err := copied.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := copied.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = copied.Wait() }()
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := disk.Shutdown(); err != nil {
		t.Fatal(err)
	}
	if err := disk.Remount(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(disk.Path("file"), nil, 0o644); err != nil {
		t.Errorf("the file system that was shut down came back: %v", err)
	}
	if err := disk.Close(); err != nil {
		t.Error(err)
	}
}

// TestLocks: a build of minutes does not keep a test from the programs that all tests need.
func TestLocks(t *testing.T) {
	t.Setenv(binVar, t.TempDir())
	for _, what := range []string{"containerd-1.7.35", programs} {
		_, _, unlock, err := binDir(what) // for ever, if they have one lock
		if err != nil {
			t.Fatal(err)
		}
		defer unlock()
	}
}

// TestBuildOnce: of the processes of one run of tests, the first builds.
func TestBuildOnce(t *testing.T) {
	t.Setenv(binVar, t.TempDir())
	build := func(run string) string {
		t.Helper()
		t.Setenv(suiteVar, run)
		built.Clear() // as in another process
		path, err := BuildTool(t.Context(), "damage/witness")
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	path := build("one")
	whole, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		run   string
		again bool
	}{{"one", false}, {"two", true}, {"two", false}, {"", true}, {"", true}} {
		if err := os.WriteFile(path, nil, 0o755); err != nil {
			t.Fatal(err)
		}
		build(c.run)
		now, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if again := now.Size() == whole.Size(); again != c.again {
			t.Errorf("run %q: built again: %t, want %t", c.run, again, c.again)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(build("two")); err != nil {
		t.Errorf("the binary was removed: %v", err)
	}
}

// TestDiff changes one property at a time and expects the fingerprint to show it.
func TestDiff(t *testing.T) {
	changes := map[string]func(file string) error{
		"content": func(f string) error { return os.WriteFile(f, []byte("other"), 0o644) },
		"mode":    func(f string) error { return os.Chmod(f, 0o600) },
		"setuid":  func(f string) error { return os.Chmod(f, 0o644|os.ModeSetuid) },
		"owner":   func(f string) error { return os.Lchown(f, 1, 0) },
		"group":   func(f string) error { return os.Lchown(f, 0, 1) },
		"mtime":   func(f string) error { return os.Chtimes(f, time.Unix(1, 0), time.Unix(1, 2)) },
		"link":    func(f string) error { return os.Link(f, f+"2") },
		"removed": os.Remove,
		"xattr":   func(f string) error { return setxattr(f, "user.x", "y") },
		"opaque":  func(f string) error { return setxattr(f, "trusted.overlay.opaque", "y") },
		"capability": func(f string) error {
			return setxattr(f, "security.capability", Capability(1))
		},
	}
	for name, change := range changes {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, "file")
			if err := os.WriteFile(file, []byte("first"), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(file, time.Unix(1, 0), time.Unix(1, 1)); err != nil {
				t.Fatal(err)
			}
			before, again := fingerprint(t, dir), fingerprint(t, dir)
			if d := Diff(before, again, 10); d != "" {
				t.Errorf("nothing changed, but:\n%s", d)
			}
			if err := change(file); err != nil {
				t.Fatal(err)
			}
			after := fingerprint(t, dir)
			before.Untime(".")
			after.Untime(".")
			if d := Diff(before, after, 10); !strings.Contains(d, `"file"`) {
				t.Errorf("difference not seen: %q", d)
			}
		})
	}
}

// TestImagesAreDeterministic builds each fixed image twice and compares digests,
// so that what fails on one machine can be reproduced on another.
func TestImagesAreDeterministic(t *testing.T) {
	reg, err := StartRegistry(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := reg.Close(); err != nil {
			t.Error(err)
		}
	})
	for name, build := range map[string]func() Image{"all-kinds": AllKinds, "empty-layers": EmptyLayers} {
		first, err := Push(t.Context(), reg, name, build())
		if err != nil {
			t.Fatal(err)
		}
		second, err := Push(t.Context(), reg, name, build())
		if err != nil {
			t.Fatal(err)
		}
		if first.Manifest != second.Manifest {
			t.Errorf("%s: manifest %s, then %s", name, first.Manifest, second.Manifest)
		}
		t.Logf("%s: %d layers, %d entries, %d bytes, %s", name, len(first.Layers), first.Inodes, first.Bytes, first.Manifest)
	}
}

func setxattr(file, name, value string) error { return unix.Lsetxattr(file, name, []byte(value), 0) }

func fingerprint(t *testing.T, dir string) Tree {
	t.Helper()
	tree, err := Fingerprint(dir)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func waitUntil(t *testing.T, ok func() bool, what string) {
	t.Helper()
	for deadline := time.Now().Add(slow); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
	}
}

// TestAbsoluteNames: a tar may name its entries from the root on.
func TestAbsoluteNames(t *testing.T) {
	untimed := map[string]bool{}
	layer := NewLayer(Plain, Dir("/a", 0o755), File("/a/b/c", 0o644, ""))
	if err := layer.write(io.Discard, untimed); err != nil {
		t.Fatal(err)
	}
	if !untimed["a/b"] || !untimed["."] || untimed["a"] {
		t.Errorf("untimed %v", untimed)
	}
}

// TestWhile: a process does nothing while it stands still, and goes on afterwards.
func TestWhile(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	p, err := StartProcess("writer", log, nil, "/bin/sh", "-c", "while :; do echo x; done")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Kill(); err != nil {
			t.Error(err)
		}
	})
	size := func() int64 {
		info, err := os.Stat(log)
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	waitUntil(t, func() bool { return size() > 0 }, "nothing was written")
	var before, after int64
	if err := p.While(func() error {
		before = size()
		time.Sleep(100 * time.Millisecond)
		after = size()
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if before != after {
		t.Errorf("%d bytes were written by a process that stands still", after-before)
	}
	waitUntil(t, func() bool { return size() > after }, "the process does not go on")
}

// TestSum: every change of a kind that a sum has makes another one, and reading makes none.
func TestSum(t *testing.T) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	sum := func(dir string) uint64 {
		t.Helper()
		n, err := Sum(dir)
		must(err)
		return n
	}
	// ramfs has coarse times: two writes within four milliseconds change nothing but the content.
	coarse := t.TempDir()
	must(unix.Mount("ramfs", coarse, "ramfs", unix.MS_NOATIME, ""))
	t.Cleanup(func() { must(unix.Unmount(coarse, 0)) })
	long := bytes.Repeat([]byte("0123456789abcdef"), 5000) // more than one read
	written := func(last byte) (at unix.Timespec, of uint64) {
		long[len(long)-1] = last
		f, err := os.OpenFile(filepath.Join(coarse, "file"), os.O_WRONLY|os.O_CREATE, 0o644)
		must(err)
		_, err = f.Write(long)
		must(errors.Join(err, f.Close()))
		var st unix.Stat_t
		must(unix.Stat(f.Name(), &st))
		return st.Ctim, sum(coarse)
	}
	for tries := 0; ; tries++ {
		at, first := written('x')
		at2, second := written('y')
		if at == at2 {
			if first == second {
				t.Error("another byte, the same sum")
			}
			break
		}
		if tries == 1000 {
			t.Fatal("no two writes at the same time")
		}
	}

	dir := t.TempDir()
	file, link := filepath.Join(dir, "d", "file"), filepath.Join(dir, "link")
	must(os.Mkdir(filepath.Dir(file), 0o755))
	must(os.WriteFile(file, long, 0o644))
	must(os.Symlink("d/file", link))
	must(unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600))
	sum(dir) // changes the times of access
	last := sum(dir)
	if again := sum(dir); again != last {
		t.Fatalf("of the same tree: %x and %x", last, again)
	}
	for _, change := range []struct {
		name string
		do   func() error
	}{
		{"length", func() error { return os.Truncate(file, 7) }},
		{"mode", func() error { return os.Chmod(file, 0o600) }},
		{"owner", func() error { return os.Lchown(link, 1, 2) }},
		{"attribute", func() error { return unix.Setxattr(file, "trusted.overlay.origin", []byte("x"), 0) }},
		{"its value", func() error { return unix.Setxattr(file, "trusted.overlay.origin", []byte("y"), 0) }},
		{"name", func() error { return os.Rename(file, file+"2") }},
		{"second name", func() error { return os.Link(file+"2", file) }},
		{"target", func() error { return errors.Join(os.Remove(link), os.Symlink("d/file2", link)) }},
		{"access", func() error { return os.Chtimes(file, time.Unix(5, 5), time.Unix(6, 6)) }},
		{"gone", func() error { return os.Remove(filepath.Join(dir, "pipe")) }},
	} {
		must(change.do())
		now := sum(dir)
		if now == last {
			t.Errorf("%s: the same sum", change.name)
		}
		last = now
	}
	if _, err := Sum(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of no directory: %v", err)
	}
}

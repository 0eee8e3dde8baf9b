package mounts

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func fatal(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func now(t *testing.T) Machine {
	t.Helper()
	m, err := Read()
	fatal(t, err)
	return m
}

// mountOverlay mounts an overlay with one file in its lower directory, on one
// file system.
func mountOverlay(t *testing.T) (lower, merged string) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"lower", "upper", "work", "merged"} {
		fatal(t, os.Mkdir(filepath.Join(dir, name), 0o755))
	}
	lower, merged = filepath.Join(dir, "lower"), filepath.Join(dir, "merged")
	fatal(t, os.WriteFile(filepath.Join(lower, "file"), []byte("content"), 0o755))
	options := "lowerdir=" + lower + ",upperdir=" + filepath.Join(dir, "upper") + ",workdir=" + filepath.Join(dir, "work")
	if err := unix.Mount("overlay", merged, "overlay", 0, options); err != nil {
		t.Skip("mounting needs root: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(merged, unix.MNT_DETACH) })
	return lower, merged
}

func (m Machine) at(point string) (Mount, bool) {
	i := slices.IndexFunc(m.Mounts, func(m Mount) bool { return m.Point == point })
	if i < 0 {
		return Mount{}, false
	}
	return m.Mounts[i], true
}

// TestRead finds a mount of this namespace.
func TestRead(t *testing.T) {
	lower, merged := mountOverlay(t)
	m, ok := now(t).at(merged)
	if !ok || m.Type != "overlay" || !strings.Contains(m.Options, "lowerdir="+lower) {
		t.Fatalf("%+v, %v", m, ok)
	}
	var st unix.Stat_t
	fatal(t, unix.Stat(filepath.Join(merged, "file"), &st))
	if have := (Device{unix.Major(st.Dev), unix.Minor(st.Dev)}); have != m.Device {
		t.Errorf("its files are on %v, the mount has %v", have, m.Device)
	}
}

// TestOtherNamespace finds a mount that only another process's namespace has.
func TestOtherNamespace(t *testing.T) {
	_, merged := mountOverlay(t)
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Skip(err)
	}
	ended := false
	end := func() {
		if !ended {
			ended = true
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(end)
	fatal(t, unix.Unmount(merged, 0)) // its namespace is a copy, and private
	if _, ok := now(t).at(merged); !ok {
		t.Error("a mount of another namespace was not found")
	}
	end()
	if _, ok := now(t).at(merged); ok {
		t.Error("found after its namespace had gone")
	}
}

// TestDetached finds files in use of an overlay that is mounted nowhere any more,
// whatever holds them.
func TestDetached(t *testing.T) {
	for name, hold := range map[string]func(t *testing.T, merged string) (release func()){
		"descriptor": func(t *testing.T, merged string) func() {
			f, err := os.Open(filepath.Join(merged, "file"))
			fatal(t, err)
			return func() { f.Close() }
		},
		"path descriptor": func(t *testing.T, merged string) func() {
			fd, err := unix.Open(merged, unix.O_PATH|unix.O_CLOEXEC, 0)
			fatal(t, err)
			return func() { unix.Close(fd) }
		},
		"mapping": func(t *testing.T, merged string) func() {
			f, err := os.Open(filepath.Join(merged, "file"))
			fatal(t, err)
			p, err := unix.Mmap(int(f.Fd()), 0, 7, unix.PROT_READ, unix.MAP_PRIVATE)
			fatal(t, err)
			fatal(t, f.Close())
			return func() { fatal(t, unix.Munmap(p)) }
		},
		"directory": func(t *testing.T, merged string) func() {
			cmd := exec.Command("sleep", "60")
			cmd.Dir, cmd.SysProcAttr = merged, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			fatal(t, cmd.Start())
			return func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, merged := mountOverlay(t)
			m, _ := now(t).at(merged)
			release := hold(t, merged)
			if m2 := now(t); slices.Contains(m2.Detached, m.Device) {
				t.Errorf("detached while it is mounted")
			}
			fatal(t, unix.Unmount(merged, unix.MNT_DETACH))
			if m2 := now(t); !slices.Contains(m2.Detached, m.Device) {
				t.Errorf("%v is not in %v", m.Device, m2.Detached)
			}
			release()
			if m2 := now(t); slices.Contains(m2.Detached, m.Device) {
				t.Errorf("still found")
			}
		})
	}
}

// TestKeptNamespace: a namespace without a process, kept by a descriptor, may
// have mounts that cannot be seen.
func TestKeptNamespace(t *testing.T) {
	if !now(t).Complete {
		t.Skip("this process does not see all processes of the machine")
	}
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Skip(err)
	}
	ns, err := os.Open("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/ns/mnt")
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	fatal(t, err)
	if now(t).Complete {
		t.Error("complete, with a namespace that cannot be read")
	}
	fatal(t, ns.Close())
}

// TestReadOneAtATime: while one Read is stuck, another does not get stuck, too.
func TestReadOneAtATime(t *testing.T) {
	if testing.Short() {
		t.Skip("takes as long as Read waits")
	}
	reading <- struct{}{}
	_, err := Read()
	<-reading
	if !errors.Is(err, ErrStuck) {
		t.Errorf("got %v", err)
	}
}

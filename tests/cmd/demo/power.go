package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// patience is for the kernel to let go of what killed processes held.
const patience = 30 * time.Second

// cutPower stops the disks and then everything that runs. In this order: a
// daemon that is still alive must not find time to write.
func cutPower(halves []*half) (killed int, err error) {
	for _, h := range halves {
		if err := h.disk.Shutdown(); err != nil {
			return 0, err
		}
	}
	return killAll()
}

// killAll ends every process but this one and the first one of its PID
// namespace, which the kit made for this run alone, and waits until they are
// gone: daemons, shims, containers.
func killAll() (int, error) {
	// Without the kit's namespace this would end everything on the machine.
	self, err := os.Stat("/proc/self/exe")
	if err != nil {
		return 0, fmt.Errorf("kill: %w", err)
	}
	first, err := os.Stat("/proc/1/exe")
	if err != nil {
		return 0, fmt.Errorf("kill: %w", err)
	}
	if !os.SameFile(self, first) {
		return 0, errors.New("kill: not in a PID namespace of our own")
	}
	killed := map[int]bool{}
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		pids, err := others()
		if err != nil {
			return 0, err
		}
		if len(pids) == 0 {
			return len(killed), nil
		}
		if time.Now().After(deadline) {
			return 0, fmt.Errorf("kill: processes %v still run %v after SIGKILL", pids, patience)
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return 0, fmt.Errorf("kill %d: %w", pid, err)
			}
			killed[pid] = true
		}
	}
}

// others lists the processes of the namespace but this one and the first.
func others() ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err == nil && pid != 1 && pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// unmountAll unmounts the root file systems of dead containers and the disk.
func (h *half) unmountAll() error {
	points, err := mountsBelow(h.runDir())
	if err != nil {
		return err
	}
	for _, point := range slices.Backward(points) {
		if err := unix.Unmount(point, unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", point, err)
		}
	}
	return h.disk.Unmount()
}

// mountsBelow lists the mount points under dir in the order of mounting. The
// paths of this program have no character that mountinfo would escape.
func mountsBelow(dir string) ([]string, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var points []string
	for line := range strings.Lines(string(info)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			points = append(points, fields[4])
		}
	}
	return points, nil
}

// emptyRun does to a /run what a boot does. Configuration and logs stay: on a
// real machine they are elsewhere. The shims' directory is the same for both
// halves, whatever containerd's configuration contains.
func emptyRun(dir string) error {
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() && d.Name() != "state" {
			return err
		}
		if d.IsDir() {
			if err := os.RemoveAll(name); err != nil {
				return err
			}
			return fs.SkipDir
		}
		if ext := filepath.Ext(name); ext == ".toml" || ext == ".log" {
			return nil
		}
		return os.Remove(name)
	})
	if err != nil {
		return fmt.Errorf("empty %s: %w", dir, err)
	}
	const shims = "/run/containerd"
	entries, err := os.ReadDir(shims)
	if err != nil {
		return fmt.Errorf("empty %s: %w", shims, err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(shims, e.Name())); err != nil {
			return fmt.Errorf("empty %s: %w", shims, err)
		}
	}
	return nil
}

// clearAway leaves nothing behind, whatever state the halves are in. What it
// forgets dies with the kit's namespace.
func clearAway(halves []*half) error {
	_, err := killAll()
	for _, h := range halves {
		if h.disk != nil {
			err = errors.Join(err, h.unmountAll(), h.disk.Close())
		}
	}
	return err
}

package kit

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// KillAll ends every process but this one and the first one of its PID
// namespace, which [Main] made for this run alone, and waits until they are
// gone: daemons, shims, containers. It returns how many there were.
func KillAll() (int, error) {
	// Without Main's namespace this would end everything on the machine.
	self, err := os.Stat("/proc/self/exe")
	if err != nil {
		return 0, fmt.Errorf("kill: %w", err)
	}
	first, err := os.Stat("/proc/1/exe")
	if err != nil {
		return 0, fmt.Errorf("kill: %w", err)
	}
	if !Inside() || !os.SameFile(self, first) {
		return 0, errors.New("kill: not in a PID namespace of our own")
	}
	killed := map[int]bool{}
	for deadline := time.Now().Add(slow); ; time.Sleep(5 * time.Millisecond) {
		pids, err := others()
		if err != nil {
			return 0, err
		}
		if len(pids) == 0 {
			return len(killed), nil
		}
		if time.Now().After(deadline) {
			return 0, fmt.Errorf("kill: processes %v still run %v after SIGKILL", pids, slow)
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

// EmptyRun does to a RunDir what a boot does to /run, after [KillAll]: what
// containers had mounted there is unmounted, sockets and state are removed.
// Configuration and logs stay: on a real machine they are elsewhere. The shims'
// directory is the same for all RunDirs, whatever containerd's configuration
// contains.
func EmptyRun(dir string) error {
	if err := UnmountBelow(dir); err != nil {
		return err
	}
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
	entries, err := os.ReadDir(shimSockets)
	if err != nil {
		return fmt.Errorf("empty %s: %w", shimSockets, err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(shimSockets, e.Name())); err != nil {
			return fmt.Errorf("empty %s: %w", shimSockets, err)
		}
	}
	return nil
}

// PowerCut cuts the power of a node and gives it back: its disk takes no more
// writes from one instant on, every process of the run is killed, and what
// [Node.Reboot] does follows. In this order: a daemon that is still alive must
// not find time to write.
func (n *Node) PowerCut() error {
	if err := n.Disk.Shutdown(); err != nil {
		return err
	}
	return n.Reboot()
}

// Reboot kills every process of the run, empties what a boot empties, and mounts
// the node's disk again, in another boot. Nothing runs afterwards.
func (n *Node) Reboot() error {
	if err := n.Off(); err != nil {
		return err
	}
	if err := n.Disk.Unmount(); err != nil {
		return err
	}
	if err := NewBoot(); err != nil {
		return err
	}
	return n.Disk.Mount()
}

// Off kills every process of the run, shims and containers too, which [Node.Kill]
// leaves alone, and removes what they leave: mounts, sockets, cgroups. A node that
// has run pods is closed after it.
func (n *Node) Off() error {
	if _, err := KillAll(); err != nil {
		return err
	}
	removeCgroups(os.Getenv(runVar))
	dirs := []string{n.opts.Containerd.RunDir}
	if n.Daemon != nil {
		dirs = append(dirs, n.Daemon.opts.RunDir)
	}
	for _, dir := range dirs {
		if err := EmptyRun(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

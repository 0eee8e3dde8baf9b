package kit

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// CutPower ends the node as a power cut does, and boots its machine again: the file system
// writes nothing more from now on (btrfs cannot be shut down: what is in its cache is kept),
// everything that runs on the node is killed, its containers, too, what is in /run of a real
// machine is gone, the disk is mounted again, and the boot is another one. [Node.Start] starts
// the daemons. Nothing of the caller may have files of the disk open. Other nodes of the run stay as
// they are; [Node.PowerCut] kills every process of the run.
func (n *Node) CutPower() error {
	if n.opts.Disk.FS != "btrfs" {
		if err := n.Disk.Shutdown(); err != nil {
			return err
		}
	}
	if err := n.Kill(); err != nil {
		return err
	}
	if n.Containerd != nil {
		if err := n.Containerd.KillContainers(); err != nil {
			return err
		}
		if err := os.RemoveAll(n.Containerd.state()); err != nil {
			return err
		}
	}
	return errors.Join(n.Disk.Remount(), NewBoot())
}

// KillContainers kills the shims of a containerd that does not run, and all that runs below
// them, and unmounts what they leave mounted.
func (c *Containerd) KillContainers() error {
	killed := map[int]bool{}
	for deadline := time.Now().Add(slow); ; time.Sleep(10 * time.Millisecond) {
		found, err := c.shims()
		if err != nil {
			return err
		}
		for _, pid := range found {
			killed[pid] = true
		}
		// The children of a shim that is gone are found no more, and may not be gone yet.
		maps.DeleteFunc(killed, func(pid int, _ bool) bool {
			return errors.Is(unix.Kill(pid, unix.SIGKILL), unix.ESRCH)
		})
		if len(killed) == 0 && len(found) == 0 {
			return UnmountBelow(c.opts.RunDir)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("containers: processes %v still run %v after SIGKILL", slices.Sorted(maps.Keys(killed)), slow)
		}
	}
}

// shims are the processes of this containerd's shims, and those below them.
func (c *Containerd) shims() (pids []int, err error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	children := map[int][]int{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		// A process that ends meanwhile is none.
		stat, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if _, rest, ok := strings.Cut(string(stat[strings.LastIndexByte(string(stat), ')')+1:]), " "); ok {
			var state string
			var parent int
			if _, err := fmt.Sscan(rest, &state, &parent); err == nil {
				children[parent] = append(children[parent], pid)
			}
		}
		argv, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if strings.Contains("\x00"+string(argv), "\x00-address\x00"+c.Address+"\x00") {
			pids = append(pids, pid)
		}
	}
	for i := 0; i < len(pids); i++ {
		for _, child := range children[pids[i]] {
			if !slices.Contains(pids, child) {
				pids = append(pids, child)
			}
		}
	}
	return pids, nil
}

package kit

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// DebianRoot is the root directory of a minimal Debian 12 with further packages. It is
// made at the first use, which takes minutes, and kept beside the binaries. It must be
// copied, not changed: see [StartMachine].
func DebianRoot(ctx context.Context, packages ...string) (string, error) {
	_, bin, unlock, err := binDir("machine")
	if err != nil {
		return "", err
	}
	defer unlock()
	root := filepath.Join(bin, "root-"+strings.Join(packages, "+"))
	if _, err := os.Stat(root); err == nil {
		return root, nil
	}
	partial, debs := root+".partial", filepath.Join(bin, "debs")
	if err := errors.Join(os.RemoveAll(partial), os.MkdirAll(debs, 0o755)); err != nil {
		return "", fmt.Errorf("debian root: %w", err)
	}
	if _, err := run(ctx, bin, nil, "debootstrap", "--variant=minbase", "--include="+strings.Join(packages, ","),
		"--cache-dir="+debs, "bookworm", partial); err != nil {
		return "", err
	}
	return root, os.Rename(partial, root)
}

// Machine is a system with a process 1 of its own, in namespaces of its own except
// that of the network: a registry on loopback can be reached from it.
type Machine struct {
	*Process     // outside of the namespaces, which end with it
	pid      int // of its process 1, seen from here
}

//go:embed machine.sh
var machineScript string

// StartMachine boots the system in a directory, which it changes; init is its process
// 1. Further starts after the end of the machine are further boots. Call it within [Main].
func StartMachine(ctx context.Context, root, log string, init ...string) (*Machine, error) {
	group, err := machineCgroup()
	if err != nil {
		return nil, err
	}
	argv := append([]string{"sh", "-c", `echo $$ >"$1/cgroup.procs" && shift && exec unshare "$@"`, "sh", group,
		"--fork", "--pid", "--mount", "--ipc", "--uts", "--cgroup", "--kill-child", "--propagation", "private",
		"sh", "-c", machineScript, "sh", root}, init...)
	p, err := StartProcess("machine", log, nil, argv...)
	if err != nil {
		return nil, err
	}
	m := &Machine{Process: p}
	booted := func(context.Context) error {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", p.PID()))
		if err != nil {
			return err
		}
		if m.pid, err = strconv.Atoi(strings.TrimSpace(string(text))); err != nil {
			return fmt.Errorf("machine: process 1 is not there yet: %w", err)
		}
		// What makes the mounts has its root where this process has.
		if at, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", m.pid)); err != nil || at != "/" {
			return fmt.Errorf("machine: process 1 is in %q: %w", at, err)
		}
		if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", m.pid)); err != nil || filepath.Base(exe) == "dash" {
			return fmt.Errorf("machine: process 1 is %q: %w", exe, err)
		}
		return nil
	}
	if err := m.WaitReady(ctx, slow, booted); err != nil {
		return nil, errors.Join(err, m.Kill())
	}
	return m, nil
}

// machineCgroup makes the cgroup that is the root of the machine's; [Main] removes it
// with those that the machine makes.
func machineCgroup() (string, error) {
	for _, top := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(top, &st) != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		dir := filepath.Join(top, os.Getenv(runVar), "machine")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", fmt.Errorf("machine: %w", err)
		}
		return dir, nil
	}
	return "", errors.New("machine: no cgroup2 is mounted below /sys/fs/cgroup")
}

// Path is where a file of the machine can be reached from outside.
func (m *Machine) Path(name string) string { return fmt.Sprintf("/proc/%d/root%s", m.pid, name) }

// Run runs a program of the machine and returns its standard output.
func (m *Machine) Run(ctx context.Context, argv ...string) (string, error) {
	return run(ctx, "/", nil, append([]string{"nsenter", "-t", strconv.Itoa(m.pid), "-p", "-m", "-C", "-i", "-u", "env", "-i",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "DEBIAN_FRONTEND=noninteractive"}, argv...)...)
}

// KillOne ends a process of the machine with SIGKILL, by the number that it has there.
func (m *Machine) KillOne(pid int) error {
	files, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		return err
	}
	ours, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", m.pid))
	if err != nil {
		return fmt.Errorf("kill in machine: %w", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		_, line, _ := strings.Cut(string(text), "\nNSpid:")
		line, _, _ = strings.Cut(line, "\n")
		numbers := strings.Fields(line)
		ns, _ := os.Readlink(filepath.Join(filepath.Dir(file), "ns", "pid"))
		if len(numbers) > 1 && ns == ours && numbers[len(numbers)-1] == strconv.Itoa(pid) {
			outside, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			if err != nil {
				return err
			}
			return unix.Kill(outside, unix.SIGKILL)
		}
	}
	return fmt.Errorf("kill in machine: it has no process %d", pid)
}

// Kill is the end of all processes of the machine at once. When it returns, none of
// its mounts is left.
func (m *Machine) Kill() error {
	if m.pid != 0 && m.Running() {
		if err := unix.Kill(m.pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("machine: %w", err)
		}
	}
	select {
	case <-m.Done():
		return nil
	case <-time.After(slow):
	}
	return errors.Join(fmt.Errorf("machine: process 1 has not ended %v after SIGKILL", slow), m.Process.Kill())
}

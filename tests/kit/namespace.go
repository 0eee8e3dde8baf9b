package kit

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stageVar is the part that a re-executed process plays: absent for the one
// the user started, then stageInit, then stageWork.
const (
	stageVar  = "DURABLE_KIT_STAGE"
	runVar    = "DURABLE_KIT_RUN"
	stageInit = "init"
	stageWork = "work"

	scratchPrefix = "durable-kit-"
	shimSockets   = "/run/containerd"
)

// Main runs f in a mount and PID namespace of its own and returns its exit code.
// It starts the program again with the same arguments, so everything before the
// call runs three times and should do nothing. Call it first thing in TestMain
// or main:
//
//	func TestMain(m *testing.M) { os.Exit(kit.Main(m.Run)) }
//
// Inside, os.TempDir is a scratch directory that is removed at the end, mounts
// are private, and the death of the namespace's first process kills every
// daemon, container and shim, which in turn frees the mounts and loop devices.
func Main(f func() int) int {
	switch os.Getenv(stageVar) {
	case stageWork:
		os.Unsetenv(stageVar)
		return f()
	case stageInit:
		return report(initProcess())
	}
	if Inside() {
		// A test that runs its own binary again is in the namespace already.
		return f()
	}
	return report(outside())
}

// Inside reports whether the process runs in the namespace that Main makes.
func Inside() bool { return os.Getenv(runVar) != "" }

// Private is the error of mounting a disk outside of [Main]: another test that starts
// copies the mount, and the file system keeps the device until that test ends.
func Private() error {
	if !Inside() {
		return errors.New("mount a disk: outside of kit.Main, another test that starts would keep it mounted")
	}
	return nil
}

func report(code int, err error) int {
	if err != nil {
		fmt.Fprintln(os.Stderr, "kit:", err)
		if code == 0 {
			code = 1
		}
	}
	return code
}

// outside is the process the user started. It waits, passes signals on, and
// clears away what a namespace cannot: files and cgroup directories.
func outside() (code int, err error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("namespace: mounts and loop devices need root")
	}
	// Pdeathsig follows the thread that forked, not the process. Without the
	// lock the Go runtime could end that thread and kill the run for nothing.
	runtime.LockOSThread()

	sweepScratch()
	scratch, lock, err := newScratch()
	if err != nil {
		return 1, err
	}
	defer func() {
		err = errors.Join(err, waitNoLoop(scratch), os.RemoveAll(scratch), lock.Close())
	}()
	// It stays afterwards: removing a directory takes away what other runs have
	// mounted on it in their namespaces (rmdir(2) detaches since Linux 3.18), and
	// an empty one in /run does no harm.
	if err := os.Mkdir(shimSockets, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
		return 1, fmt.Errorf("namespace: %w", err)
	}
	run := filepath.Base(scratch)
	defer removeCgroups(run)

	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), stageVar+"="+stageInit, runVar+"="+run, "TMPDIR="+scratch)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
		// A terminal sends Ctrl-C to the whole foreground group. Outside of it,
		// the program gets the one signal that is passed on, not three.
		Setpgid: true,
	}
	stop := forwardSignals(func(s os.Signal) { cmd.Process.Signal(s) }, cmd.Start)
	if stop == nil {
		return 1, errors.New("namespace: clone: not possible here")
	}
	defer stop()
	// The last process in a mount namespace unmounts what is left. If that
	// were a FUSE server that was killed, it would wait for its own answer, and
	// its end would never come: so it is we who are the last.
	mounts, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", cmd.Process.Pid))
	if err != nil {
		return 1, errors.Join(fmt.Errorf("namespace: %w", err), cmd.Process.Kill(), cmd.Wait())
	}
	err = cmd.Wait()
	mounts.Close()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exitCode(exit.Sys().(syscall.WaitStatus)), nil
	}
	return 0, err
}

// initProcess is process 1 of the namespace. It stays small because its death
// is what cleans up: the kernel kills everything else in the namespace with it.
func initProcess() (int, error) {
	if os.Getpid() != 1 {
		return 1, fmt.Errorf("namespace: %s=%s is set, but this is process %d, not the first", stageVar, stageInit, os.Getpid())
	}
	// Unlike os/exec, ForkExec keeps both values of a variable that is there
	// twice, and the first one wins.
	if err := os.Setenv(stageVar, stageWork); err != nil {
		return 1, fmt.Errorf("namespace: %w", err)
	}
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 1, fmt.Errorf("namespace: make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return 1, fmt.Errorf("namespace: mount /proc: %w", err)
	}
	// Shims put their sockets under this path whatever containerd's configuration
	// is. A private tmpfs keeps runs apart from each other and from the host.
	if err := unix.Mount("tmpfs", shimSockets, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=711"); err != nil {
		return 1, fmt.Errorf("namespace: mount %s: %w", shimSockets, err)
	}
	self, err := os.Executable()
	if err != nil {
		return 1, fmt.Errorf("namespace: %w", err)
	}
	var worker int
	start := func() (err error) {
		worker, err = syscall.ForkExec(self, os.Args, &syscall.ProcAttr{
			Env:   os.Environ(),
			Files: []uintptr{0, 1, 2},
		})
		return err
	}
	stop := forwardSignals(func(s os.Signal) { syscall.Kill(worker, s.(syscall.Signal)) }, start)
	if stop == nil {
		return 1, fmt.Errorf("namespace: start %s again", self)
	}
	defer stop()
	return reap(worker)
}

// reap collects every orphan of the namespace until the worker itself ends.
func reap(worker int) (int, error) {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return 1, fmt.Errorf("namespace: wait: %w", err)
		}
		if pid == worker && (status.Exited() || status.Signaled()) {
			return exitCode(status), nil
		}
	}
}

func exitCode(s syscall.WaitStatus) int {
	if s.Signaled() {
		return 128 + int(s.Signal())
	}
	return s.ExitStatus()
}

// forwardSignals catches signals before start runs, so that none is lost in
// between, and hands them to send from then on. It returns nil when start fails.
func forwardSignals(send func(os.Signal), start func() error) (stop func()) {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	if err := start(); err != nil {
		signal.Stop(signals)
		fmt.Fprintln(os.Stderr, "kit: namespace:", err)
		return nil
	}
	done := make(chan struct{})
	go func() {
		for {
			select {
			case s := <-signals:
				send(s)
			case <-done:
				return
			}
		}
	}()
	return func() { signal.Stop(signals); close(done) }
}

// newScratch makes a directory and holds a lock in it for as long as the
// process lives. The lock gets its name only once it is held, so that
// sweepScratch of another run never sees an unlocked one that is in use.
func newScratch() (string, *os.File, error) {
	dir, err := os.MkdirTemp("", scratchPrefix)
	if err != nil {
		return "", nil, fmt.Errorf("namespace: %w", err)
	}
	f, err := os.Create(filepath.Join(dir, "lock.new"))
	if err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, "lock"))
	}
	if err != nil {
		return "", nil, errors.Join(fmt.Errorf("namespace: scratch directory: %w", err), os.RemoveAll(dir))
	}
	return dir, f, nil
}

// sweepScratch removes the files of runs that were killed before they could.
func sweepScratch() {
	locks, _ := filepath.Glob(filepath.Join(os.TempDir(), scratchPrefix+"*", "lock"))
	for _, name := range locks {
		f, err := os.Open(name)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			os.RemoveAll(filepath.Dir(name))
			removeCgroups(filepath.Base(filepath.Dir(name)))
		}
		f.Close()
	}
}

// waitNoLoop waits until no loop device holds a file under dir. The kernel
// drops a dead namespace's mounts a moment after its last process is gone.
func waitNoLoop(dir string) error {
	deadline := time.Now().Add(30 * time.Second)
	for {
		var held []string
		names, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
		if err != nil {
			return err
		}
		for _, name := range names {
			// A device that goes away between the two calls is what we wait for.
			if file, err := os.ReadFile(name); err == nil && strings.HasPrefix(string(file), dir+"/") {
				held = append(held, strings.TrimSpace(string(file)))
			}
		}
		if len(held) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("namespace: loop devices still hold %s", strings.Join(held, ", "))
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// removeCgroups removes the cgroups of a run whose containers died with the
// namespace, before runc could do it, or that runc leaves: each has the name of a namespace of
// containerd, which begins with that of the run. With cgroup v1 there is one a controller.
func removeCgroups(run string) {
	for _, name := range []string{run, run + "-*"} {
		for _, dir := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
			tops, _ := filepath.Glob(dir + name)
			for _, top := range tops {
				removeCgroup(top)
			}
		}
	}
}

// removeCgroup removes a cgroup and those inside it. Only rmdir works, and it
// refuses one that still has a process, so this cannot hurt a living run.
func removeCgroup(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			removeCgroup(filepath.Join(dir, e.Name()))
		}
	}
	os.Remove(dir)
}

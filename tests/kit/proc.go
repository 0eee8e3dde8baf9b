package kit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Process is a long-running child whose output goes to a log file.
type Process struct {
	name string
	log  string
	cmd  *exec.Cmd
	done chan struct{} // closed when the child has been reaped; guards err
	err  error
}

// slow is what anything may take on a machine with other work beside the tests.
// What is never going to happen is seen that much later, and nothing else is.
const slow = 2 * time.Minute

// StartProcess runs argv with its output appended to the file log.
func StartProcess(name, log string, env []string, argv ...string) (*Process, error) {
	return startProcess(name, log, env, nil, argv...)
}

// startProcess passes files on, too, from descriptor 3.
func startProcess(name, log string, env []string, files []*os.File, argv ...string) (*Process, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer f.Close()
	p := &Process{name: name, log: log, cmd: exec.Command(argv[0], argv[1:]...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr, p.cmd.ExtraFiles = f, f, files
	p.cmd.Env = append(os.Environ(), env...)
	// A program that takes a relative path it should refuse does its damage in
	// a scratch directory.
	p.cmd.Dir = filepath.Dir(log)
	// A group of its own: Ctrl-C must reach the kit, which stops its children
	// in order, and not the children all at once.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// PID is the child's process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed once the child has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Running reports whether the child is still there.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// WaitReady polls ready until it returns nil. It gives up at the deadline or as
// soon as the child ends, and then returns what the child had logged.
func (p *Process) WaitReady(ctx context.Context, limit time.Duration, ready func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended before it was ready: %v\n%s", p.name, p.err, p.LogTail(4096))
		case <-ctx.Done():
			return fmt.Errorf("%s not ready after %v: %w\n%s", p.name, limit, err, p.LogTail(4096))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Stop sends SIGTERM to the child and waits. An exit status other than
// zero is an error; a child that does not end in time is killed, and that is an
// error too.
func (p *Process) Stop() error {
	if !p.Running() {
		return fmt.Errorf("stop %s: it had ended already: %v\n%s", p.name, p.err, p.LogTail(4096))
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", p.name, err)
	}
	select {
	case <-p.done:
	case <-time.After(slow):
		return errors.Join(fmt.Errorf("stop %s: still running %v after SIGTERM\n%s", p.name, slow, p.LogTail(4096)), p.Kill())
	}
	if p.err != nil {
		return fmt.Errorf("stop %s: %w\n%s", p.name, p.err, p.LogTail(4096))
	}
	return nil
}

// While runs do while the child is stopped by SIGSTOP, in all its threads: so that
// it changes nothing in a directory that do changes, and sees nothing half done.
func (p *Process) While(do func() error) (err error) {
	if err := p.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		return fmt.Errorf("stop %s for a while: %w", p.name, err)
	}
	defer func() {
		if e := p.cmd.Process.Signal(syscall.SIGCONT); e != nil {
			err = errors.Join(err, fmt.Errorf("continue %s: %w", p.name, e))
		}
	}()
	for deadline := time.Now().Add(slow); ; time.Sleep(time.Millisecond) {
		stopped, err := p.stopped()
		if err != nil {
			return err
		}
		if stopped {
			return do()
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s has not stopped %v after SIGSTOP", p.name, slow)
		}
	}
}

// stopped reports whether every thread of the child is stopped (proc_pid_stat(5)):
// one that is in a system call ends that first.
func (p *Process) stopped() (bool, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.PID()))
	if err != nil || len(files) == 0 {
		return false, fmt.Errorf("%s has no threads: %v", p.name, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // a thread that has ended
		}
		if err != nil {
			return false, err
		}
		// The name of the program, in parentheses, may hold anything.
		if _, state, _ := strings.Cut(string(text[strings.LastIndexByte(string(text), ')'):]), " "); state[0] != 'T' {
			return false, nil
		}
	}
	return true, nil
}

// Kill ends the child with SIGKILL and waits until it is gone. Killing one that
// has ended is no error.
func (p *Process) Kill() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", p.name, err)
	}
	<-p.done
	return nil
}

// Wait waits for the child to end by itself and returns its exit code, or the
// negative number of the signal that ended it.
func (p *Process) Wait(limit time.Duration) (int, error) {
	select {
	case <-p.done:
		if status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			return -int(status.Signal()), nil
		}
		return p.cmd.ProcessState.ExitCode(), nil
	case <-time.After(limit):
		return 0, fmt.Errorf("%s still running after %v\n%s", p.name, limit, p.LogTail(4096))
	}
}

// Log returns all the child has logged so far.
func (p *Process) Log() (string, error) {
	b, err := os.ReadFile(p.log)
	return string(b), err
}

// LogTail returns the last n bytes of the log, for a failure message.
func (p *Process) LogTail(n int64) string {
	f, err := os.Open(p.log)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	if size, err := f.Seek(0, io.SeekEnd); err == nil && size > n {
		_, err = f.Seek(-n, io.SeekEnd)
		if err != nil {
			return err.Error()
		}
	} else {
		f.Seek(0, io.SeekStart)
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return err.Error()
	}
	return "--- end of " + filepath.Base(p.log) + ":\n" + string(b)
}

// run executes a short command and returns its standard output. The error
// carries what it wrote to standard error.
func run(ctx context.Context, dir string, env []string, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s%s", strings.Join(argv, " "), err, stderr.Bytes(), tail(stdout.String(), 2048))
	}
	return stdout.String(), nil
}

func tail(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return "…" + s[len(s)-n:]
}

// Ticks are the units of /proc/PID/stat in a second (USER_HZ), on all architectures that Go has.
const Ticks = 100

// ProcessorTime is that of processes, and of their children that have ended, in seconds. Its
// resolution is 10 ms a process.
func ProcessorTime(pids ...int) (float64, error) {
	sum := 0
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, err
		}
		// The name of the program, in parentheses, may hold anything. What follows begins
		// with field 3 of proc_pid_stat(5); utime, stime, cutime and cstime are 14 to 17.
		fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		if len(fields) < 15 {
			return 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
		}
		for _, f := range fields[11:15] {
			n, err := strconv.Atoi(f)
			if err != nil {
				return 0, fmt.Errorf("/proc/%d/stat: %w", pid, err)
			}
			sum += n
		}
	}
	return float64(sum) / Ticks, nil
}

// Memory is a figure of a process in /proc/PID/status, such as VmRSS, in bytes.
func Memory(pid int, field string) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return n << 10, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/status has no %s", pid, field)
}

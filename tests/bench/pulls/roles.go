package pulls

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// roleVar is set for a process that is this program, started again with another task.
const roleVar = "DURABLE_BENCH_ROLE"

var roles = map[string]func(args []string) error{"disk": serveDisk, "neighbor": dirty, "probe": probe}

// Init does the task of a process that a run has started, and does not return then. In every
// other process it does nothing. Call it first in main or TestMain.
func Init() {
	role := os.Getenv(roleVar)
	if role == "" {
		return
	}
	if err := roles[role](os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", role, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// child is a process with a task. It ends when its standard input does, so with this process.
type child struct {
	role  string
	cmd   *exec.Cmd
	stdin io.Closer
	out   *bufio.Reader
	err   strings.Builder
}

// startChild starts a task, and returns when it is under way.
func startChild(role string, args ...string) (*child, error) {
	c := &child{role: role, cmd: exec.Command("/proc/self/exe", args...)}
	c.cmd.Env = append(os.Environ(), roleVar+"="+role)
	c.cmd.Dir = "/" // never a disk that is measured
	c.cmd.Stderr = &c.err
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us
	stdin, err := c.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	c.stdin, c.out = stdin, bufio.NewReader(out)
	if err := c.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", role, err)
	}
	if line, err := c.out.ReadString('\n'); line != "ready\n" {
		return nil, errors.Join(fmt.Errorf("start %s: it printed %q: %v", role, line, err), c.end(nil))
	}
	return c, nil
}

// end ends the task, and reads what it has found.
func (c *child) end(found any) error {
	err := c.stdin.Close()
	if found != nil {
		if e := json.NewDecoder(c.out).Decode(found); e != nil {
			err = errors.Join(err, fmt.Errorf("its result: %w", e))
		}
	}
	_, e := io.Copy(io.Discard, c.out)
	if err = errors.Join(err, e, c.cmd.Wait()); err != nil {
		return fmt.Errorf("end %s: %w: %s", c.role, err, c.err.String())
	}
	return nil
}

// ready reports to startChild that the task is under way. What it returns is closed when the task is to end.
func ready() <-chan struct{} {
	fmt.Println("ready")
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	return ended
}

// found is the other end of child.end.
func found(v any) error { return json.NewEncoder(os.Stdout).Encode(v) }

// scratch makes a directory with a short name, as the path of a socket has room for 107 bytes.
func scratch(name string) (string, error) {
	dir := filepath.Join(os.TempDir(), name)
	return dir, os.MkdirAll(dir, 0o755)
}

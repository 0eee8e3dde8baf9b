package kittest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Hold has every syncfs of a process wait before it begins.
type Hold struct {
	pid     int
	release func()
}

// HoldSyncs begins to hold the syncs of a process, until Release is called or the test ends.
// strace(1) stops the threads that call syncfs.
func HoldSyncs(t testing.TB, pid int) *Hold {
	t.Helper()
	const hour = "3600000000" // µs
	cmd := exec.Command("strace", "-f", "-p", strconv.Itoa(pid), "-o", "/dev/null", "-e", "trace=syncfs", "-e", "inject=syncfs:delay_enter="+hour)
	out := Must[io.ReadCloser](t)(cmd.StderrPipe())
	Check(t, cmd.Start())
	h := &Hold{pid: pid, release: sync.OnceFunc(func() {
		err := cmd.Process.Signal(syscall.SIGINT)
		// It ends with the signal that it got.
		if werr := cmd.Wait(); !errors.As(werr, new(*exec.ExitError)) {
			err = errors.Join(err, werr)
		}
		if err != nil {
			t.Errorf("strace: %v", err)
		}
	})}
	t.Cleanup(h.release)
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "attached") {
			return h
		}
	}
	t.Fatalf("strace has not attached: %q, %v", lines.Text(), lines.Err())
	return nil
}

// Release ends it.
func (h *Hold) Release() { h.release() }

// Holds reports whether a thread of the process waits with its syncfs.
func (h *Hold) Holds() bool {
	calls, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", h.pid))
	for _, name := range calls {
		// proc(5): the number of the call that the thread is in, and its arguments.
		if text, err := os.ReadFile(name); err == nil && strings.HasPrefix(string(text), strconv.Itoa(unix.SYS_SYNCFS)+" ") {
			return true
		}
	}
	return false
}

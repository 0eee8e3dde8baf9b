package idle

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The first thread of the process is for the main goroutine alone. The runtime
// never ends it, and the tests wait for threads to end.
func init() { runtime.LockOSThread() }

// priority is the I/O priority of a thread, 0 for the calling one.
func priority(t testing.TB, tid int) uintptr {
	t.Helper()
	p, _, errno := unix.RawSyscall(unix.SYS_IOPRIO_GET, whoProcess, uintptr(tid), 0)
	if errno != 0 {
		t.Fatalf("ioprio_get %d: %v", tid, errno)
	}
	return p
}

// readBy returns how many bytes a thread of this process has requested with
// read(2) and the like (rchar of proc_pid_io(5)).
func readBy(t testing.TB, tid int) (n int64) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/io", tid))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fscanf(bytes.NewReader(b), "rchar: %d", &n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestRun(t *testing.T) {
	const size = 1 << 20
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	var tid int
	stop := errors.New("stop")
	if err := Run(func() error {
		tid = unix.Gettid()
		if p := priority(t, 0); p != classIdle {
			t.Errorf("priority %#x", p)
		}
		// Blocking, so that the scheduler would move a goroutine that is
		// not bound to its thread.
		for range 100 {
			time.Sleep(100 * time.Microsecond)
		}
		before := readBy(t, tid)
		if _, err := os.ReadFile(path); err != nil {
			t.Error(err)
		}
		if n := readBy(t, tid) - before; n < size {
			t.Errorf("the idle thread has read %d bytes of %d", n, size)
		}
		return stop
	}); !errors.Is(err, stop) {
		t.Errorf("error %v", err)
	}
	ended(t, tid)
}

// ended waits until a thread is gone.
func ended(t *testing.T, tid int) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", tid)); errors.Is(err, os.ErrNotExist) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("thread %d is still there", tid)
		}
		time.Sleep(time.Millisecond)
	}
}

// TestOthers: the priority does not spread to threads that other goroutines run
// on, not even to those that start while idle work goes on.
func TestOthers(t *testing.T) {
	const n = 50
	var tids [5]int
	for i := range tids {
		if err := Run(func() error {
			tids[i] = unix.Gettid()
			var (
				blocked sync.WaitGroup
				started sync.WaitGroup
				unblock = make([]int, 2)
			)
			if err := unix.Pipe(unblock); err != nil {
				return err
			}
			defer unix.Close(unblock[0])
			started.Add(n)
			for range n { // more threads than there were
				blocked.Go(func() {
					if p := priority(t, 0); p == classIdle {
						t.Errorf("thread %d has idle priority", unix.Gettid())
					}
					started.Done()
					_, _ = unix.Read(unblock[0], make([]byte, 1))
				})
			}
			started.Wait()
			if p := priority(t, 0); p != classIdle {
				t.Errorf("priority %#x in the end", p)
			}
			err := unix.Close(unblock[1])
			blocked.Wait()
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	for _, tid := range tids {
		ended(t, tid)
	}
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range threads {
		var tid int
		if _, err := fmt.Sscan(thread.Name(), &tid); err != nil {
			t.Fatal(err)
		}
		p, _, errno := unix.RawSyscall(unix.SYS_IOPRIO_GET, whoProcess, uintptr(tid), 0)
		if errno == 0 && p == classIdle {
			t.Errorf("thread %d was left behind with idle priority", tid)
		}
	}
}

// TestPause: each failure doubles the pause, up to the longest.
func TestPause(t *testing.T) {
	var p Pause
	if !p.Due() {
		t.Error("what has not failed is not due")
	}
	for _, want := range []time.Duration{time.Hour, 2 * time.Hour, 4 * time.Hour, 5 * time.Hour, 5 * time.Hour} {
		if p.Failed(time.Hour, 5*time.Hour); p.next != want || p.Due() {
			t.Errorf("a pause of %v, want %v; due: %v", p.next, want, p.Due())
		}
	}
	if p.Begin(time.Nanosecond); p.next != time.Nanosecond {
		t.Errorf("a pause of %v after Begin", p.next)
	}
	time.Sleep(time.Millisecond)
	if !p.Due() {
		t.Error("a pause that is over is not due")
	}
}

package crash

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
)

// messVar is set in a copy of the test binary that mounts a recording disk,
// writes to it, and waits to be killed.
const messVar = "DURABLE_CRASH_MESS"

// TestMess is what the copy runs.
func TestMess(t *testing.T) {
	if os.Getenv(messVar) == "" {
		return // only of use to TestNothingOutlivesAKill
	}
	d, err := disk.Start(disk.Ext4.MinSize())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := d.Format(disk.Ext4); err != nil {
		t.Fatal(err)
	}
	if err := d.Mount(disk.Ext4, dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "dirty"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	fmt.Println("MESS")
	time.Sleep(time.Hour)
}

// TestNothingOutlivesAKill kills a run whose mounted disk is served by a process
// of that run. The unmounting must not wait for an answer from the dead.
func TestNothingOutlivesAKill(t *testing.T) {
	for range 3 { // who is last is a matter of luck
		// The path of a socket has at most 107 bytes, and t.TempDir holds the
		// name of the test.
		scratch, err := os.MkdirTemp("", "k")
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestMess$", "-test.v")
		cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool {
			return strings.HasPrefix(v, "DURABLE_KIT_RUN=") || strings.HasPrefix(v, "TMPDIR=")
		}), messVar+"=1", "TMPDIR="+scratch)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for lines.Scan() && lines.Text() != "MESS" {
			t.Log(lines.Text())
		}
		if lines.Text() != "MESS" {
			t.Fatalf("the run is not ready: %v", cmd.Wait())
		}
		// It is passed on to the test, which does not live to unmount anything.
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		select {
		case <-ended: // its error is the signal just sent
		case <-time.After(30 * time.Second):
			t.Fatalf("process %d waits for its namespace to end", cmd.Process.Pid)
		}
	}
}

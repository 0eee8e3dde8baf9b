package kit

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// leakVar is set in a copy of the test binary that makes a mess and waits.
const leakVar = "DURABLE_KIT_LEAK"

// TestMess is what the copy runs: a mounted disk, a process that ignores
// SIGTERM, a cgroup, and no tidying up.
func TestMess(t *testing.T) {
	if os.Getenv(leakVar) == "" {
		return // only of use to TestNothingOutlivesTheNamespace
	}
	disk, err := NewDisk(t.TempDir(), DiskOptions{FS: "ext4", Size: 64 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := StartProcess("sleep", disk.Path("log"), nil, "sh", "-c", "trap '' TERM; while :; do sleep 1; done"); err != nil {
		t.Fatal(err)
	}
	cgroup := filepath.Join(firstCgroup(t), os.Getenv(runVar), "container")
	if err := os.MkdirAll(cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	fmt.Printf("MESS %s %s\n", os.Getenv(runVar), disk.Device())
	time.Sleep(time.Hour)
}

// TestNothingOutlivesTheNamespace kills a run in each of the ways a run can die
// and searches for what it had.
func TestNothingOutlivesTheNamespace(t *testing.T) {
	for _, kill := range []string{"KILL", "TERM", "INT", "QUIT"} {
		t.Run(kill, func(t *testing.T) {
			scratch := t.TempDir()
			cmd := exec.Command("/proc/self/exe", "-test.run=^TestMess$", "-test.v")
			for _, v := range os.Environ() {
				if !strings.HasPrefix(v, runVar+"=") && !strings.HasPrefix(v, "TMPDIR=") {
					cmd.Env = append(cmd.Env, v)
				}
			}
			cmd.Env = append(cmd.Env, leakVar+"=1", "TMPDIR="+scratch)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			run, device := "", ""
			for lines := bufio.NewScanner(out); run == "" && lines.Scan(); {
				fmt.Sscanf(lines.Text(), "MESS %s %s", &run, &device)
			}
			if run == "" {
				t.Fatalf("the run printed nothing: %v", cmd.Wait())
			}
			backing := "/sys/block/" + filepath.Base(device) + "/loop/backing_file"
			if !holds(backing, run) {
				t.Fatalf("%s is not attached in the first place", device)
			}
			if err := exec.Command("kill", "-"+kill, fmt.Sprint(cmd.Process.Pid)).Run(); err != nil {
				t.Fatal(err)
			}
			cmd.Wait() // its error is the signal just sent
			waitUntil(t, func() bool { return !holds(backing, run) }, device+" is still attached")
			waitUntil(t, func() bool { return processesOf(t, run) == "" }, "processes are left")
			if kill == "KILL" {
				// No process was left to remove the files. The next run does.
				again := exec.Command("/proc/self/exe", "-test.run=^TestMess$")
				again.Env = append(cmd.Env, leakVar+"=")
				if out, err := again.CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			if left, _ := filepath.Glob(filepath.Join(scratch, "*")); len(left) != 0 {
				t.Errorf("files are left: %q", left)
			}
			if _, err := os.Stat(filepath.Join(firstCgroup(t), run)); err == nil {
				t.Error("the cgroup is left")
			}
		})
	}
}

func holds(backing, run string) bool {
	b, err := os.ReadFile(backing)
	return err == nil && strings.Contains(string(b), run)
}

// processesOf lists processes that carry the run's name in their environment.
func processesOf(t *testing.T, run string) string {
	t.Helper()
	found := ""
	envs, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range envs {
		if b, err := os.ReadFile(name); err == nil && strings.Contains(string(b), runVar+"="+run) {
			found += name + " "
		}
	}
	return found
}

// firstCgroup is the root of some cgroup hierarchy, of version 1 or 2.
func firstCgroup(t *testing.T) string {
	t.Helper()
	for _, dir := range []string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err == nil {
			return dir
		}
	}
	t.Fatal("no cgroup file system")
	return ""
}

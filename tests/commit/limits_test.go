package commit

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// attribute gives a file so many extended attributes of 64 KiB.
func attribute(t *testing.T, file string, n int) {
	t.Helper()
	value := bytes.Repeat([]byte("A"), 1<<16)
	for i := range n {
		check(t, unix.Setxattr(file, fmt.Sprintf("user.a%d", i), value, 0))
	}
}

// peakMemory is the most memory that a process had, in MiB.
func peakMemory(t *testing.T, pid int) float64 {
	t.Helper()
	status := must[[]byte](t)(os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)))
	for line := range strings.Lines(string(status)) {
		var kib float64
		if n, _ := fmt.Sscanf(line, "VmHWM: %f", &kib); n == 1 {
			return kib / 1024
		}
	}
	t.Fatalf("no VmHWM of process %d", pid)
	return 0
}

// TestLargeAttributes: a layer with half a gigabyte of extended attributes, which a tar
// of a megabyte can hold, is committed in little memory and is whole afterwards;
// one with an entry that no seal can describe is refused.
func TestLargeAttributes(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{FS: "xfs", Size: 4 << 30})
	d := newDaemon(t, kit.DaemonOptions{Dir: disk.Path()})
	sn := start(t, d)
	dir := upper(t, must[mounts](t)(sn.Prepare(t.Context(), "many", "")))
	for i := range 512 {
		file := filepath.Join(dir, fmt.Sprint(i))
		check(t, os.WriteFile(file, nil, 0o644))
		attribute(t, file, 15)
	}
	began := time.Now()
	check(t, sn.Commit(t.Context(), "layer", "many"))
	t.Logf("the Commit took %v, the daemon %.0f MiB", time.Since(began), peakMemory(t, d.PID()))
	if mib := peakMemory(t, d.PID()); mib > 150 {
		t.Errorf("the daemon took %.0f MiB", mib)
	}
	if out, err := program(t, d, "check"); err != nil {
		t.Errorf("check: %v: %s", err, out)
	}

	dir = upper(t, must[mounts](t)(sn.Prepare(t.Context(), "one", "")))
	check(t, os.WriteFile(dir+"/file", nil, 0o644))
	attribute(t, dir+"/file", 220)
	err := sn.Commit(t.Context(), "too large", "one")
	if err == nil || !strings.Contains(err.Error(), "/file: too many extended attributes") || !strings.Contains(err.Error(), "4194304 bytes") {
		t.Errorf("the error is %v", err)
	}
	if out, err := program(t, d, "check"); err != nil {
		t.Errorf("check: %v: %s", err, out)
	}
}

// TestMountedInLayer: a Commit does not take what is mounted for the layer's, and
// succeeds when it is unmounted; a check meanwhile finds no damage.
func TestMountedInLayer(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{FS: "ext4", Size: 256 << 20})
	d := newDaemon(t, kit.DaemonOptions{Dir: disk.Path()})
	sn := start(t, d)
	dir := upper(t, must[mounts](t)(sn.Prepare(t.Context(), "key", "")))
	at := dir + "/mnt"
	check(t, os.Mkdir(at, 0o755))
	check(t, os.WriteFile(at+"/own", []byte("own"), 0o644))
	// The daemon is in this process' mount namespace.
	mountOver := func() (unmount func()) {
		check(t, unix.Mount("none", at, "tmpfs", 0, ""))
		check(t, os.WriteFile(at+"/foreign", nil, 0o644))
		return func() { check(t, unix.Unmount(at, 0)) }
	}
	unmount := mountOver()
	if err := sn.Commit(t.Context(), "layer", "key"); err == nil || !strings.Contains(err.Error(), at+" is a mount point") {
		t.Errorf("the error is %v", err)
	}
	unmount()
	check(t, sn.Commit(t.Context(), "layer", "key"))
	unmount = mountOver()
	out, err := program(t, d, "check")
	if strings.Contains(out, "damaged") || err == nil || !strings.Contains(out, "is a mount point") {
		t.Errorf("check: %v: %s", err, out)
	}
	unmount()
	if out, err := program(t, d, "check"); err != nil {
		t.Errorf("check: %v: %s", err, out)
	}
}

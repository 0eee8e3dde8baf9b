package kittest

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// NewSystem copies a root directory of [kit.DebianRoot] to a disk, for machines.
func NewSystem(t testing.TB, packages ...string) (root string, disk *kit.Disk) {
	t.Helper()
	from := Must[string](t)(kit.DebianRoot(context.Background(), packages...))
	disk = NewDisk(t, kit.DiskOptions{})
	root = disk.Path("root")
	copyTo(t, root, from)
	// An empty name of the machine's own: systemd gives it one at its first boot.
	Check(t, os.WriteFile(filepath.Join(root, "etc/machine-id"), nil, 0o444))
	return root, disk
}

// InstallContainerd puts containerd, ctr and the shim of [Binaries] into a directory of a system.
func InstallContainerd(t testing.TB, dir string) {
	t.Helper()
	bins := Binaries(t)
	Check(t, os.MkdirAll(dir, 0o755))
	copyTo(t, dir, bins.Containerd, bins.Ctr, filepath.Join(bins.Dir, "containerd-shim-runc-v2"))
}

func copyTo(t testing.TB, to string, from ...string) {
	t.Helper()
	if out, err := exec.Command("cp", append(append([]string{"-a"}, from...), to)...).CombinedOutput(); err != nil {
		t.Fatalf("cp %v %s: %v: %s", from, to, err, out)
	}
}

// StartMachine boots a system, and ends it after the test.
func StartMachine(t testing.TB, root string, init ...string) *kit.Machine {
	t.Helper()
	m := Must[*kit.Machine](t)(kit.StartMachine(t.Context(), root, filepath.Join(Scratch(t), "machine.log"), init...))
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(m.LogTail(4000))
		}
		Check(t, m.Kill())
	})
	return m
}

// In runs a program of a machine, and ends the test when it fails.
func In(t testing.TB, m *kit.Machine, argv ...string) string {
	t.Helper()
	return Must[string](t)(m.Run(t.Context(), argv...))
}

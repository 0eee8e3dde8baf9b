package kittest

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// NewSystem copies a root directory of [kit.DebianRoot] to a disk, for machines, and
// puts what containerd needs into its /usr/local/bin.
func NewSystem(t testing.TB, packages ...string) string {
	t.Helper()
	from := Must[string](t)(kit.DebianRoot(context.Background(), packages...))
	root := filepath.Join(NewDisk(t, kit.DiskOptions{}).Path(), "root")
	bins := Binaries(t)
	copies := [][]string{{from, root}}
	for _, b := range []string{bins.Containerd, bins.Ctr, filepath.Join(bins.Dir, "containerd-shim-runc-v2")} {
		copies = append(copies, []string{b, filepath.Join(root, "usr/local/bin")})
	}
	for _, c := range copies {
		if out, err := exec.Command("cp", "-a", c[0], c[1]).CombinedOutput(); err != nil {
			t.Fatalf("cp %v: %v: %s", c, err, out)
		}
	}
	// An empty name of the machine's own: systemd gives it one at its first boot.
	Check(t, os.WriteFile(filepath.Join(root, "etc/machine-id"), nil, 0o444))
	return root
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

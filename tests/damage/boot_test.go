package damage

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// bootID is where the kernel names a boot (random(4)).
const bootID = "/proc/sys/kernel/random/boot_id"

var boots atomic.Int64

// coverBootID puts a file of ours over the kernel's, in our mount namespace.
var coverBootID = sync.OnceValues(func() (string, error) {
	file := filepath.Join(os.TempDir(), "boot_id")
	if err := os.WriteFile(file, nil, 0o444); err != nil {
		return "", err
	}
	return file, os.NewSyscallError("mount "+bootID, unix.Mount(file, bootID, "", unix.MS_BIND, ""))
})

// nextBoot makes this another boot for every process that asks from now on.
func nextBoot(t *testing.T) {
	t.Helper()
	file := must[string](t)(coverBootID())
	id := fmt.Sprintf("b0070000-0000-4000-8000-%012d\n", boots.Add(1))
	check(t, os.WriteFile(file, []byte(id), 0o444))
	if got := must[[]byte](t)(os.ReadFile(bootID)); string(got) != id {
		t.Fatalf("the boot ID is %q, want %q", got, id)
	}
}

// uncleanBoot is what daemon and containerd see of a power cut that took nothing:
// they had no time to end, and the next ones run in another boot.
func (n *node) uncleanBoot(t *testing.T) {
	t.Helper()
	check(t, n.containerd.Kill())
	check(t, n.daemon.Kill())
	nextBoot(t)
	check(t, n.daemon.Start(t.Context()))
	check(t, n.containerd.Start(t.Context()))
}

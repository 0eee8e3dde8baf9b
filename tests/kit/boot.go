package kit

import (
	"crypto/rand"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// bootIDPath is where the kernel names a boot (random(4)).
const bootIDPath = "/proc/sys/kernel/random/boot_id"

// coverBootID puts a file of ours over the kernel's, for all processes of our
// mount namespace.
var coverBootID = sync.OnceValues(func() (*os.File, error) {
	f, err := os.CreateTemp("", "boot_id")
	if err != nil {
		return nil, err
	}
	id := newBootID()
	if _, err := f.WriteString(id); err != nil {
		return nil, err
	}
	if err := unix.Mount(f.Name(), bootIDPath, "", unix.MS_BIND, ""); err != nil {
		return nil, os.NewSyscallError("mount "+bootIDPath, err)
	}
	// Every unclean shutdown in the tests depends on this.
	seen, err := os.ReadFile(bootIDPath)
	if err == nil && string(seen) != id {
		err = fmt.Errorf("%s reads %q, not %q", bootIDPath, seen, id)
	}
	return f, err
})

// newBootID is random, as the kernel's is: a disk may be verified by another
// process than the one that has recorded it.
func newBootID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24
	return fmt.Sprintf("%x-%x-%x-%x-%x\n", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// NewBoot makes this another boot for every process that reads the boot ID from now on. After
// a Kill it is equal to a power cut that took nothing from the disk. Two
// callers that do it at once both get a boot that no disk has seen. It must be
// called in a mount namespace of one's own, such as that of [Main].
func NewBoot() error {
	f, err := coverBootID()
	if err == nil {
		// In place and of the same length: no process may read half of it.
		_, err = f.WriteAt([]byte(newBootID()), 0)
	}
	if err != nil {
		return fmt.Errorf("new boot: %w", err)
	}
	return nil
}

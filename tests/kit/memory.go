package kit

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// InMemory runs f with a tmpfs in place of os.TempDir, disks and all, for tests
// in which no power is cut, or that of disks which are in memory anyway: what they
// find does not depend on the time that a disk takes to sync, and they can do more
// of it. The tmpfs goes with the
// namespace that [Main] makes:
//
//	func TestMain(m *testing.M) {
//		os.Exit(kit.Main(func() int { return kit.InMemory(m.Run) }))
//	}
func InMemory(f func() int) int {
	if err := unix.Mount("tmpfs", os.TempDir(), "tmpfs", 0, "size=8g"); err != nil {
		return report(1, fmt.Errorf("mount a tmpfs on %s: %w", os.TempDir(), err))
	}
	return f()
}

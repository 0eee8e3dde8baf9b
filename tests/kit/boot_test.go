package kit

import (
	"os/exec"
	"testing"
)

// TestNewBoot: another process sees another boot, whose name has the form of
// the kernel's.
func TestNewBoot(t *testing.T) {
	seen := map[string]bool{}
	for i := range 3 {
		if i > 0 {
			if err := NewBoot(); err != nil {
				t.Fatal(err)
			}
		}
		id, err := exec.Command("cat", bootIDPath).Output()
		if err != nil {
			t.Fatal(err)
		}
		if len(id) != len("00000000-0000-0000-0000-000000000000\n") || seen[string(id)] {
			t.Errorf("after %d new boots: %q, after those of %v", i, id, seen)
		}
		seen[string(id)] = true
	}
}

package twosums

import "testing"

// TestRight: where the processor has the instructions, the sums are right. At a start it would go unnoticed.
func TestRight(t *testing.T) {
	if !supported() {
		t.Skip("the processor has no instructions for SHA-256")
	}
	if !right() {
		t.Error("the sums of blocks are not those of crypto/sha256")
	}
}

package twosums

import "crypto/sha256"

// together reports whether the processor has the instructions of blocks, and both sums are right
// here: a wrong one of a file would look like damage later.
var together = supported() && right()

// supported reports SSSE3, SSE4.1 and the SHA extensions (Intel SDM, CPUID leaves 1 and 7).
func supported() bool {
	highest, _, ecx := cpuid(1)
	const ssse3, sse41 = 1 << 9, 1 << 19
	if highest < 7 || ecx&ssse3 == 0 || ecx&sse41 == 0 {
		return false
	}
	_, ebx, _ := cpuid(7)
	const sha = 1 << 29
	return ebx&sha != 0
}

// right compares both sums of three blocks with those of crypto/sha256.
func right() bool {
	p := make([]byte, 4*block)
	for i := range p {
		p[i] = byte(i * i)
	}
	a, b := sha256.New(), sha256.New()
	a.Write(p[:block])
	n := new(Writer).whole(a, b, p[block:])
	return n == 3*block && [32]byte(a.Sum(nil)) == sha256.Sum256(p) && [32]byte(b.Sum(nil)) == sha256.Sum256(p[block:])
}

// cpuid returns the highest leaf, and two registers of one leaf.
func cpuid(leaf uint32) (highest, ebx, ecx uint32)

// blocks brings two states forward by the whole blocks of 64 bytes in p.
//
//go:noescape
func blocks(a, b *[8]uint32, p []byte)

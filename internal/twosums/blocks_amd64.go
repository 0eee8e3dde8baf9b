package twosums

// together reports whether the processor has the instructions of blocks: SSSE3, SSE4.1 and
// the SHA extensions (Intel SDM, CPUID leaves 1 and 7).
var together = func() bool {
	highest, _, ecx := cpuid(1)
	const ssse3, sse41 = 1 << 9, 1 << 19
	if highest < 7 || ecx&ssse3 == 0 || ecx&sse41 == 0 {
		return false
	}
	_, ebx, _ := cpuid(7)
	const sha = 1 << 29
	return ebx&sha != 0
}()

// cpuid returns the highest leaf, and two registers of one leaf.
func cpuid(leaf uint32) (highest, ebx, ecx uint32)

// blocks brings two states forward by the whole blocks of 64 bytes in p.
//
//go:noescape
func blocks(a, b *[8]uint32, p []byte)

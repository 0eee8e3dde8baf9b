package gunzip

import "math/bits"

// An entry of a table is what the next bits of a stream mean.
//
//	literal    the byte in bits 16 to 23
//	special    the rest of a long code is in another part of the table, which begins at
//	           the base and is chosen by as many bits as in 8 to 12; or end, of a block;
//	           or, with neither, no code of this block
//	otherwise  a length or a distance: base in bits 16 to 30, how long the code is in bits 8 to
//	           12, how long it is with its extra bits in bits 0 to 4
//
// Bits 0 to 4 are what an entry takes of the stream.
const (
	literal = 1 << 31
	special = 1 << 15
	longer  = 1 << 14
	end     = 1 << 13

	invalid   = special
	baseShift = 16
	baseMask  = 0x7fff
	codeShift = 8
	bitsMask  = 0x1f
)

const (
	maxCode    = 15  // bits of the longest code
	maxLits    = 288 // codes of literals and lengths, of which two are never valid
	maxDists   = 32  // codes of distances, of which two are never valid
	endOfBlock = 256

	// A code of more bits than these takes two accesses.
	litBits     = 11
	distBits    = 9
	lengthsBits = 7 // all of them are shorter

	// The first part of a table, and one for each beginning that longer codes have in
	// common, at most half as many as there are codes. Powers of two.
	litSize  = 1 << 13
	distSize = 1 << 11
)

// What the codes mean, as entries without a code (RFC 1951, 3.2.5).
var (
	litMeans  [maxLits]uint32
	distMeans [maxDists]uint32
	lenMeans  [19]uint32
)

func init() {
	for i := range endOfBlock {
		litMeans[i] = literal | uint32(i)<<baseShift
	}
	litMeans[endOfBlock] = special | end
	base := uint32(3)
	for i := range 28 {
		extra := uint32(max(0, i/4-1))
		litMeans[endOfBlock+1+i] = base<<baseShift | extra
		base += 1 << extra
	}
	litMeans[285] = 258 << baseShift
	litMeans[286], litMeans[287] = invalid, invalid
	base = 1
	for i := range 30 {
		extra := uint32(max(0, i/2-1))
		distMeans[i] = base<<baseShift | extra
		base += 1 << extra
	}
	distMeans[30], distMeans[31] = invalid, invalid
	for i := range lenMeans {
		lenMeans[i] = uint32(i) << baseShift
	}
}

// build fills a table, whose first part is chosen by size bits, from how long the code of
// each symbol is, 0 for none. It reports whether there are such codes: none is the
// beginning of another, and all bits mean something, but where there is one code of one
// bit, or none at all.
func build(table []uint32, size int, lens []uint8, means []uint32) bool {
	var count [maxCode + 1]int
	for _, n := range lens {
		count[n]++
	}
	count[0] = 0
	var next [maxCode + 2]int // the next code of each length
	most, codes := 0, 0
	for n := 1; n <= maxCode; n++ {
		next[n+1] = (next[n] + count[n]) << 1
		if count[n] > 0 {
			most = n
			codes += count[n]
		}
	}
	complete := most > 0 && next[most]+count[most] == 1<<most
	if !complete {
		if codes > 1 || most > 1 {
			return false
		}
		for i := range 1 << size {
			table[i] = invalid
		}
	}
	free := 1 << size
	for i := range free {
		table[i] &^= longer // of the block before
	}
	for symbol, length := range lens {
		n := int(length)
		if n == 0 {
			continue
		}
		code := int(bits.Reverse16(uint16(next[n])) >> (16 - n)) // its first bit is the lowest
		next[n]++
		if n <= size {
			e := entry(means[symbol], n)
			for i := code; i < 1<<size; i += 1 << n {
				table[i] = e
			}
			continue
		}
		first := &table[code&(1<<size-1)]
		if *first&(special|longer) != special|longer {
			*first = special | longer | uint32(free)<<baseShift | uint32(most-size)<<codeShift | uint32(size)
			free += 1 << (most - size)
		}
		part := table[*first>>baseShift&baseMask:][:1<<(most-size)]
		e := entry(means[symbol], n-size)
		for i := code >> size; i < len(part); i += 1 << (n - size) {
			part[i] = e
		}
	}
	return true
}

// entry is what a symbol means, with a code of n bits.
func entry(means uint32, n int) uint32 {
	return means + uint32(n)<<codeShift + uint32(n)
}

package gunzip

import (
	"encoding/binary"
	"errors"
	"io"
)

const (
	window  = 32 << 10      // how far back a match can begin
	outSize = 256 << 10     // a power of two
	outRoom = 64 + 258 + 32 // what one turn of the loop writes: literals of a bit each, the longest match, and what a copy writes after it
	inSize  = 64 << 10
	inRoom  = 16 // what the loop may load after the bits that it needs

	mostEmpty = 100 // reads of nothing in a row, without an error, as in package bufio
)

// errCorrupt is that of a stream that is no deflate.
var errCorrupt = errors.New("gzip: the compressed data is corrupt")

// What is next in a stream.
type state int

const (
	header state = iota // of a block
	stored              // bytes that are not compressed
	codes
	last // nothing: the last block has ended
)

// inflater decompresses deflate.
type inflater struct {
	src    io.Reader
	srcErr error // why there is no more
	in     [inSize + inRoom]byte
	pos    int // the next byte of in
	end    int // of what in holds
	zeros  int // how many bytes before end are not of the stream

	// The bits after those that have been used, the next one lowest. Above
	// count there are either zeros or the bits of in[pos:], which come again.
	bits  uint64
	count uint

	out   [outSize]byte // the window, and what follows it
	from  int           // where what the caller has not had begins
	to    int           // where it ends
	first int           // of the member, if it is in the window; no match begins before it

	next  state
	final bool // the block is the last one
	left  int  // bytes of a stored block

	lits  [litSize]uint32
	dists [distSize]uint32
}

// more has at least 16 bytes in in[pos:end]: of the stream, or zeros after its end.
func (z *inflater) more() {
	if z.end-z.pos >= inRoom {
		return
	}
	kept := min(z.pos, 8) // align may go back to them
	z.end = copy(z.in[:], z.in[z.pos-kept:z.end])
	z.pos = kept
	for empty := 0; z.end-z.pos < inRoom && z.srcErr == nil; {
		var n int
		n, z.srcErr = z.src.Read(z.in[z.end:inSize])
		z.end += n
		if n > 0 {
			empty = 0
		} else if empty++; empty == mostEmpty && z.srcErr == nil {
			z.srcErr = io.ErrNoProgress
		}
	}
	if missing := inRoom - (z.end - z.pos); missing > 0 {
		clear(z.in[z.end : z.end+missing])
		z.zeros += missing
		z.end += missing
	}
}

// ahead is how many whole bytes of the stream are loaded and not used, less than zero
// when bits were used that are not of the stream.
func (z *inflater) ahead() int {
	return z.end - z.pos + int(z.count/8) - z.zeros
}

func (z *inflater) exhausted() bool { return z.ahead() < 0 }

// cut is the error of a stream that is exhausted.
func (z *inflater) cut() error {
	if z.srcErr == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return z.srcErr
}

// peek has the next n bits, 32 at most, in z.bits.
func (z *inflater) peek(n uint) uint32 {
	if z.count < n {
		z.more()
		z.bits |= binary.LittleEndian.Uint64(z.in[z.pos:]) << z.count
		z.pos += int((63 - z.count) / 8)
		z.count |= 56
	}
	return uint32(z.bits & (1<<n - 1))
}

func (z *inflater) drop(n uint) {
	z.bits >>= n
	z.count -= n
}

func (z *inflater) take(n uint) uint32 {
	bits := z.peek(n)
	z.drop(n)
	return bits
}

// align drops the rest of a byte, and gives back to in what was loaded after it.
func (z *inflater) align() {
	z.pos -= int(z.count / 8)
	z.bits, z.count = 0, 0
}

// step decodes until out is full, or the block has ended, or has begun. It must not be called
// when out is full.
func (z *inflater) step() (err error) {
	to := z.to
	switch z.next {
	case header:
		err = z.begin()
	case stored:
		z.copyStored()
	case codes:
		err = z.decode()
	}
	if z.exhausted() {
		z.to = to
		return z.cut()
	}
	return err
}

// begin reads what stands before the codes of a block (RFC 1951, 3.2.3).
func (z *inflater) begin() error {
	if z.final {
		z.align()
		z.next = last
		return nil
	}
	z.final = z.take(1) == 1
	switch z.take(2) {
	case 0:
		z.align()
		size := z.take(16)
		if z.take(16) != ^size&0xffff {
			return errCorrupt
		}
		z.align()
		z.left = int(size)
		z.next = stored
		return nil
	case 1:
		z.fixed()
	case 2:
		if !z.dynamic() {
			return errCorrupt
		}
	default:
		return errCorrupt
	}
	z.next = codes
	return nil
}

// fixed makes the tables of RFC 1951, 3.2.6.
func (z *inflater) fixed() {
	var lens [maxLits]uint8
	for i := range lens {
		switch {
		case i < 144, i >= 280:
			lens[i] = 8
		case i < 256:
			lens[i] = 9
		default:
			lens[i] = 7
		}
	}
	build(z.lits[:], litBits, lens[:], litMeans[:])
	for i := range maxDists {
		lens[i] = 5
	}
	build(z.dists[:], distBits, lens[:maxDists], distMeans[:])
}

// dynamic makes the tables that stand in the stream (RFC 1951, 3.2.7).
func (z *inflater) dynamic() bool {
	lits, dists, n := int(z.take(5))+257, int(z.take(5))+1, int(z.take(4))+4
	if lits > 286 || dists > 30 {
		return false
	}
	var small [19]uint8
	for _, i := range []int{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}[:n] {
		small[i] = uint8(z.take(3))
	}
	var table [1 << lengthsBits]uint32
	if !build(table[:], lengthsBits, small[:], lenMeans[:]) {
		return false
	}
	var lens [maxLits + maxDists]uint8
	for i := 0; i < lits+dists; {
		e := table[z.peek(lengthsBits)]
		if e&special != 0 {
			return false
		}
		z.drop(uint(e & bitsMask))
		length, times := uint8(e>>baseShift), 1
		switch {
		case length == 16 && i == 0:
			return false
		case length == 16:
			length, times = lens[i-1], int(z.take(2))+3
		case length == 17:
			length, times = 0, int(z.take(3))+3
		case length == 18:
			length, times = 0, int(z.take(7))+11
		}
		if i+times > lits+dists {
			return false
		}
		for range times {
			lens[i] = length
			i++
		}
	}
	return build(z.lits[:], litBits, lens[:lits], litMeans[:]) &&
		build(z.dists[:], distBits, lens[lits:lits+dists], distMeans[:])
}

// copyStored copies what there is of a stored block.
func (z *inflater) copyStored() {
	for z.left > 0 && z.to < outSize-outRoom && !z.exhausted() {
		z.more()
		n := min(z.left, z.end-z.pos, outSize-outRoom-z.to)
		copy(z.out[z.to:], z.in[z.pos:z.pos+n])
		z.pos += n
		z.to += n
		z.left -= n
	}
	if z.left == 0 {
		z.next = header
	}
}

// decode decodes the codes of a block, until it ends, or out is full.
func (z *inflater) decode() (err error) {
	for z.next == codes && err == nil && z.to < outSize-outRoom && !z.exhausted() {
		z.more()
		err = z.decodeLoaded()
	}
	return err
}

// decodeLoaded is decode for what in holds.
//
// In each turn 56 bits are loaded: enough for a few literals, or some of them and a length;
// a distance may need more. What changes is in variables of the function, which the compiler
// keeps in registers; with the masks on indexes it leaves bounds checks out.
func (z *inflater) decodeLoaded() (err error) {
	in, out, lits, dists := &z.in, &z.out, &z.lits, &z.dists
	pos, to, bits, count := z.pos, z.to, z.bits, z.count
	lastPos := z.end - inRoom
loop:
	for to < outSize-outRoom && pos <= lastPos {
		bits |= binary.LittleEndian.Uint64(in[pos:pos+8]) << (count & 63)
		pos += int((63 - count) >> 3)
		count |= 56

		e := lits[bits&(1<<litBits-1)]
		for e&literal != 0 {
			bits >>= e & bitsMask
			count -= uint(e & bitsMask)
			out[to&(outSize-1)] = byte(e >> baseShift)
			to++
			if count < maxCode+5 {
				continue loop
			}
			e = lits[bits&(1<<litBits-1)]
		}
		if e&(special|longer) == special|longer {
			bits >>= litBits
			count -= litBits
			e = lits[(e>>baseShift&baseMask+uint32(bits)&(1<<(e>>codeShift&bitsMask)-1))&(litSize-1)]
			if e&literal != 0 {
				bits >>= e & bitsMask
				count -= uint(e & bitsMask)
				out[to&(outSize-1)] = byte(e >> baseShift)
				to++
				continue
			}
		}
		code := uint32(bits)
		bits >>= e & bitsMask
		count -= uint(e & bitsMask)
		if e&special != 0 {
			if e&end == 0 {
				err = errCorrupt
			}
			z.next = header
			break
		}
		length := int(e>>baseShift + code&(1<<(e&bitsMask)-1)>>(e>>codeShift&bitsMask))

		if count < maxCode+13 {
			bits |= binary.LittleEndian.Uint64(in[pos:pos+8]) << (count & 63)
			pos += int((63 - count) >> 3)
			count |= 56
		}
		e = dists[bits&(1<<distBits-1)]
		if e&special != 0 {
			if e&longer == 0 {
				err = errCorrupt
				break
			}
			bits >>= distBits
			count -= distBits
			e = dists[(e>>baseShift&baseMask+uint32(bits)&(1<<(e>>codeShift&bitsMask)-1))&(distSize-1)]
			if e&special != 0 {
				err = errCorrupt
				break
			}
		}
		code = uint32(bits)
		bits >>= e & bitsMask
		count -= uint(e & bitsMask)
		distance := int(e>>baseShift + code&(1<<(e&bitsMask)-1)>>(e>>codeShift&bitsMask))

		from := to - distance
		switch {
		case from < z.first:
			err = errCorrupt
			break loop
		case distance >= 16 && length <= 32: // nearly all
			src, dst := out[from:from+32], out[to:to+32]
			binary.LittleEndian.PutUint64(dst, binary.LittleEndian.Uint64(src))
			binary.LittleEndian.PutUint64(dst[8:], binary.LittleEndian.Uint64(src[8:]))
			if length > 16 {
				binary.LittleEndian.PutUint64(dst[16:], binary.LittleEndian.Uint64(src[16:]))
				binary.LittleEndian.PutUint64(dst[24:], binary.LittleEndian.Uint64(src[24:]))
			}
		case distance >= length:
			copy(out[to:to+length], out[from:from+length])
		default: // what it copies, it repeats
			for done := 0; done < length; {
				done += copy(out[to+done:to+length], out[from:to+done])
			}
		}
		to += length
	}
	z.pos, z.to, z.bits, z.count = pos, to, bits, count
	z.bits &= 1<<count - 1
	return err
}

package gunzip

import (
	"errors"
	"hash/crc32"
	"io"
)

// Errors of a stream that is not gzip, or is damaged. One that is cut short has
// [io.ErrUnexpectedEOF].
var (
	ErrHeader   = errors.New("gzip: invalid header")
	ErrChecksum = errors.New("gzip: invalid checksum")
)

// Reader decompresses a stream of one or more members. It takes 360 KiB of memory.
type Reader struct {
	z    inflater
	sum  uint32 // of the member
	size uint32 // of the member, modulo 1<<32, as it is recorded
	err  error
}

// NewReader reads the first header. It reads more of src than it needs.
func NewReader(src io.Reader) (*Reader, error) {
	r := &Reader{z: inflater{src: src}}
	if err := r.member(); err != nil {
		return nil, err
	}
	return r, nil
}

// Read decompresses. The checksum of a member is compared before the end of the stream,
// or what follows the member, is returned.
func (r *Reader) Read(p []byte) (int, error) {
	z := &r.z
	for z.from == z.to && r.err == nil {
		if z.to >= outSize-outRoom {
			first := z.to - window
			copy(z.out[:], z.out[first:z.to])
			z.first = max(0, z.first-first)
			z.from, z.to = window, window
		}
		for r.err == nil && z.to < outSize-outRoom && z.next != last {
			r.err = z.step()
		}
		written := z.out[z.from:z.to]
		r.sum = crc32.Update(r.sum, crc32.IEEETable, written)
		r.size += uint32(len(written))
		if r.err == nil && z.next == last {
			if r.err = r.trailer(); r.err == nil {
				r.err = r.member()
			}
		}
	}
	n := copy(p, z.out[z.from:z.to])
	z.from += n
	if z.from < z.to {
		return n, nil
	}
	return n, r.err
}

// Close is that of [io.Closer]. It closes nothing.
func (r *Reader) Close() error { return nil }

// trailer compares what stands after the blocks of a member.
func (r *Reader) trailer() error {
	z := &r.z
	sum, size := z.take(32), z.take(32)
	z.align()
	if z.exhausted() {
		return z.cut()
	}
	if sum != r.sum || size != r.size {
		return ErrChecksum
	}
	return nil
}

// The flags of a header (RFC 1952, 2.3.1).
const (
	hasChecksum = 1 << 1
	hasExtra    = 1 << 2
	hasName     = 1 << 3
	hasComment  = 1 << 4
	reserved    = 0xe0
)

// longestName is of the library that containerd has: a longer name, or comment, is refused.
const longestName = 511

// member reads the header of the next member. It returns io.EOF when nothing follows.
func (r *Reader) member() error {
	z := &r.z
	if z.more(); z.ahead() == 0 && z.srcErr == io.EOF {
		return io.EOF
	}
	sum := uint32(0)
	take := func() byte {
		b := byte(z.take(8))
		sum = crc32.Update(sum, crc32.IEEETable, []byte{b})
		return b
	}
	good := take() == 0x1f && take() == 0x8b && take() == 8
	flags := take()
	good = good && flags&reserved == 0
	for range 6 { // when, how well, and on what system it was compressed
		take()
	}
	if good && flags&hasExtra != 0 {
		for n := int(take()) | int(take())<<8; n > 0 && !z.exhausted(); n-- {
			take()
		}
	}
	for _, flag := range []byte{hasName, hasComment} {
		for n := 0; good && flags&flag != 0 && take() != 0; n++ {
			good = n < longestName
		}
	}
	if want := uint16(sum); good && flags&hasChecksum != 0 {
		good = uint16(z.take(16)) == want
	}
	z.align()
	if z.exhausted() {
		return z.cut()
	}
	if !good {
		return ErrHeader
	}
	r.sum, r.size = 0, 0
	z.next, z.final, z.first = header, false, z.to
	return nil
}

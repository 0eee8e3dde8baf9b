package gunzip

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/gzip"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// read is what there is in a stream up to its error.
func read(src io.Reader) ([]byte, error) {
	r, err := NewReader(src)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}

// expected is what the library of containerd finds there.
func expected(stream []byte) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(stream))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}

func packed(t testing.TB, plain []byte, level int) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, level)
	check(t, err)
	w.Name, w.Comment, w.Extra = "name", "comment", []byte("extra")
	_, err = w.Write(plain)
	check(t, errors.Join(err, w.Close()))
	return out.Bytes()
}

func random() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) }

// plains are contents of all kinds: what matches nothing, everything, near, far, at every
// short distance, and longer than all buffers.
func plains() map[string][]byte {
	r := random()
	noise := make([]byte, 600_000)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	var periods, words, fibonacci bytes.Buffer
	for n := 1; n < 300; n++ {
		periods.Write(bytes.Repeat(noise[n:2*n], 2+600/n))
	}
	for words.Len() < 2_000_000 {
		fmt.Fprintf(&words, "%x %s\n", r.Uint32()>>20, strings.Repeat("word", r.IntN(4)))
	}
	for a, b, c := 1, 1, byte(0); a < 300_000; a, b, c = b, a+b, c+1 { // codes of all lengths
		fibonacci.Write(bytes.Repeat([]byte{c}, a))
	}
	mixed := fibonacci.Bytes()
	r.Shuffle(len(mixed), func(i, j int) { mixed[i], mixed[j] = mixed[j], mixed[i] })
	far := append(bytes.Clone(noise[:window]), noise[:window]...) // at the longest distance
	return map[string][]byte{
		"nothing": nil, "a byte": {7}, "zeros": make([]byte, 1_000_000), "noise": noise, "periods": periods.Bytes(),
		"words": words.Bytes(), "fibonacci": mixed, "far": far,
	}
}

// TestReader: every stream holds what was put into it, wherever its source is cut into
// pieces.
func TestReader(t *testing.T) {
	for name, plain := range plains() {
		for _, level := range []int{gzip.HuffmanOnly, gzip.NoCompression, gzip.BestSpeed, 6, gzip.BestCompression} {
			stream := packed(t, plain, level)
			for kind, src := range map[string]io.Reader{
				"whole": bytes.NewReader(stream), "by bytes": iotest.OneByteReader(bytes.NewReader(stream)),
				"halves": iotest.HalfReader(bytes.NewReader(stream)), "end with data": iotest.DataErrReader(bytes.NewReader(stream)),
			} {
				if have, err := read(src); err != nil || !bytes.Equal(have, plain) {
					t.Errorf("%s, level %d, %s: %d bytes and error %v; there are %d", name, level, kind, len(have), err, len(plain))
				}
			}
		}
	}
}

// TestSmallReads: who reads little at a time reads the same.
func TestSmallReads(t *testing.T) {
	plain := plains()["words"]
	r, err := NewReader(bytes.NewReader(packed(t, plain, 6)))
	check(t, err)
	if have, err := io.ReadAll(iotest.OneByteReader(r)); err != nil || !bytes.Equal(have, plain) {
		t.Errorf("%d bytes and error %v; there are %d", len(have), err, len(plain))
	}
	if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("after the end: %d, %v", n, err)
	}
}

// TestMembers: members follow each other, empty ones too, each with a window of its own, and
// what follows them and is no member is an error.
func TestMembers(t *testing.T) {
	var stream, plain []byte
	for i := range 50 {
		part := plains()["words"][:i%7*10_000]
		stream, plain = append(stream, packed(t, part, 6)...), append(plain, part...)
	}
	if have, err := read(bytes.NewReader(stream)); err != nil || !bytes.Equal(have, plain) {
		t.Errorf("%d bytes and error %v; there are %d", len(have), err, len(plain))
	}
	for _, after := range [][]byte{{0}, make([]byte, 512), []byte("something else, and long")} {
		same(t, append(bytes.Clone(stream), after...))
	}
	// A match that reaches into the member before.
	block := newBits()
	block.put(1, 1)
	block.put(1, 2)
	block.code(0b0000001, 7) // length 3
	block.code(0, 5)         // distance 1
	block.code(0, 7)
	same(t, append(bytes.Clone(stream), member(block.bytes(), []byte("xxx"))...))
}

// same compares a stream with what the other library finds in it.
func same(t testing.TB, stream []byte) {
	t.Helper()
	want, failed := expected(stream)
	have, err := read(bytes.NewReader(stream))
	switch {
	case (err == nil) != (failed == nil):
		t.Errorf("%x: error %v, want %v", stream[:min(len(stream), 200)], err, failed)
	case err == nil && !bytes.Equal(have, want):
		t.Errorf("%x: other bytes", stream[:min(len(stream), 200)])
	}
	if long := min(len(have), len(want)); !bytes.Equal(have[:long], want[:long]) {
		t.Errorf("%x: other bytes before the error %v", stream[:min(len(stream), 200)], err)
	}
}

// TestCut: a stream that ends early is an error wherever it ends, and so is one whose source
// fails, with the error of the source; and what was read before is right.
func TestCut(t *testing.T) {
	plain := plains()["words"][:3000]
	for _, level := range []int{gzip.HuffmanOnly, gzip.NoCompression, 6} {
		stream := packed(t, plain, level)
		for n := range len(stream) + 1 {
			have, err := read(bytes.NewReader(stream[:n]))
			want := io.ErrUnexpectedEOF
			switch n {
			case 0:
				want = io.EOF
			case len(stream):
				want = nil
			}
			if err != want || !bytes.HasPrefix(plain, have) {
				t.Fatalf("level %d, cut at %d of %d: %d bytes and error %v", level, n, len(stream), len(have), err)
			}
			for _, want := range []error{errors.New("the disk has failed"), io.ErrUnexpectedEOF} {
				have, err = read(io.MultiReader(bytes.NewReader(stream[:n]), iotest.ErrReader(want)))
				if err != want || !bytes.HasPrefix(plain, have) {
					t.Fatalf("level %d, failed at %d of %d: %d bytes and error %v", level, n, len(stream), len(have), err)
				}
			}
		}
	}
}

// nothing is a source that returns no bytes and no error.
type nothing struct{}

func (nothing) Read([]byte) (int, error) { return 0, nil }

// TestNoProgress: such a source ends a stream with an error.
func TestNoProgress(t *testing.T) {
	stream := packed(t, plains()["words"][:3000], 6)
	if _, err := read(io.MultiReader(bytes.NewReader(stream[:len(stream)/2]), nothing{})); err != io.ErrNoProgress {
		t.Error(err)
	}
}

// TestAltered: whatever bit is not as it was is found by what the other library finds it
// by, or by the checksum.
func TestAltered(t *testing.T) {
	for _, level := range []int{gzip.HuffmanOnly, gzip.NoCompression, 6} {
		stream := packed(t, plains()["words"][:300], level)
		for i := range len(stream) * 8 {
			altered := bytes.Clone(stream)
			altered[i/8] ^= 1 << (i % 8)
			same(t, altered)
		}
	}
}

// TestHeader: names of every length, and checksums of headers.
func TestHeader(t *testing.T) {
	body := packed(t, []byte("body"), 6)
	body = body[bytes.Index(body, []byte("comment\x00"))+len("comment\x00"):]
	for _, flags := range []byte{0, hasName, hasComment, hasName | hasComment, 1, 1 << 5, 1 << 6, 1 << 7} {
		for _, n := range []int{0, 1, 510, 511, 512, 513, 100_000} {
			for _, kind := range []byte{0, hasChecksum} {
				h := []byte{0x1f, 0x8b, 8, flags | kind, 0, 0, 0, 0, 0, 0}
				for _, flag := range []byte{hasName, hasComment} {
					if flags&flag != 0 {
						h = append(h, append(bytes.Repeat([]byte("n"), n), 0)...)
					}
				}
				sum := uint16(crc32.ChecksumIEEE(h))
				if kind == 0 {
					same(t, append(h, body...))
					continue
				}
				for _, sum := range []uint16{sum, sum + 1} {
					same(t, append(binary.LittleEndian.AppendUint16(bytes.Clone(h), sum), body...))
				}
			}
		}
	}
}

// bitWriter writes a deflate stream.
type bitWriter struct {
	out   bytes.Buffer
	bits  uint64
	count uint
}

func newBits() *bitWriter { return &bitWriter{} }

// put writes n bits, the lowest first.
func (w *bitWriter) put(v uint64, n uint) {
	w.bits |= v << w.count
	for w.count += n; w.count >= 8; w.count -= 8 {
		w.out.WriteByte(byte(w.bits))
		w.bits >>= 8
	}
}

// code writes a code, the highest bit first.
func (w *bitWriter) code(code uint16, n uint) {
	w.put(uint64(bits.Reverse16(code)>>(16-n)), n)
}

func (w *bitWriter) bytes() []byte {
	w.put(0, (8-w.count)%8)
	return w.out.Bytes()
}

// member makes a member of a deflate stream.
func member(deflate, plain []byte) []byte {
	out := append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0}, deflate...)
	out = binary.LittleEndian.AppendUint32(out, crc32.ChecksumIEEE(plain))
	return binary.LittleEndian.AppendUint32(out, uint32(len(plain)))
}

// codeLengths makes a complete code of so many symbols, as uneven as chance wants it.
func codeLengths(r *rand.Rand, symbols, most int) []uint8 {
	lens := []uint8{0}
	for len(lens) < symbols {
		i := r.IntN(len(lens))
		if r.IntN(2) == 0 {
			i = len(lens) - 1 // deep
		}
		if int(lens[i]) == most {
			i = bytes.IndexFunc(lens, func(n rune) bool { return int(n) < most })
			if i < 0 {
				break
			}
		}
		lens[i]++
		lens = append(lens, lens[i])
	}
	if len(lens) == 1 {
		lens[0] = 1
	}
	for len(lens) < symbols {
		lens = append(lens, 0)
	}
	r.Shuffle(len(lens), func(i, j int) { lens[i], lens[j] = lens[j], lens[i] })
	return lens
}

// canonical is the code of each symbol.
func canonical(lens []uint8) []uint16 {
	codes := make([]uint16, len(lens))
	next := uint16(0)
	for n := uint8(1); n <= maxCode; n++ {
		for i, l := range lens {
			if l == n {
				codes[i] = next
				next++
			}
		}
		next <<= 1
	}
	return codes
}

// dynamic begins the last block of a stream, whose codes have these lengths: of literals, and
// after those of distances.
func (w *bitWriter) dynamic(lits int, lens []uint8) {
	w.put(1, 1)
	w.put(2, 2)
	w.put(uint64(lits-257), 5)
	w.put(uint64(len(lens)-lits-1), 5)
	w.put(15, 4)
	of := make([]uint8, 19) // a code of 4 and 5 bits for the lengths
	for i := range of {
		of[i] = 5
		if i < 13 {
			of[i] = 4
		}
	}
	for _, i := range []int{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15} {
		w.put(uint64(of[i]), 3)
	}
	codes := canonical(of)
	for _, n := range lens {
		w.code(codes[n], uint(of[n]))
	}
}

// TestCodes: blocks with codes that no compressor would choose, and blocks in which they are
// not codes at all.
func TestCodes(t *testing.T) {
	r := random()
	good := 0
	for range 1000 {
		w := newBits()
		lits, dists := 257+r.IntN(30), 1+r.IntN(30)
		lens := append(codeLengths(r, lits, maxCode), codeLengths(r, dists, maxCode)...)
		if r.IntN(4) == 0 {
			lens[r.IntN(len(lens))] = uint8(r.IntN(maxCode + 1)) // now they may be wrong
		}
		w.dynamic(lits, lens)
		lit, dist := canonical(lens[:lits]), canonical(lens[lits:])
		for range r.IntN(5000) {
			i := r.IntN(lits)
			if r.IntN(3) > 0 {
				i = r.IntN(256)
			}
			if i == endOfBlock || lens[i] == 0 {
				continue
			}
			w.code(lit[i], uint(lens[i]))
			if i > endOfBlock {
				w.put(uint64(r.Uint32())&(1<<uint(litMeans[i]&bitsMask)-1), uint(litMeans[i]&bitsMask))
				d := r.IntN(min(dists, 16))
				w.code(dist[d], uint(lens[lits+d]))
				w.put(0, uint(distMeans[d]&bitsMask))
			}
		}
		w.code(lit[endOfBlock], uint(lens[endOfBlock]))
		stream := member(w.bytes(), nil)
		// Its checksum is that of what the other library finds, so that both can agree on it.
		plain, err := expected(stream)
		if err == nil || errors.Is(err, gzip.ErrChecksum) {
			good++
			stream = member(w.bytes(), plain)
		}
		same(t, stream)
	}
	if good < 100 {
		t.Errorf("%d of the streams are good", good)
	}
}

// TestShortest: as many literals as one turn of the loop can have, and the longest match after them, wherever
// the memory for what is decoded ends.
func TestShortest(t *testing.T) {
	lens := make([]uint8, 286+1)
	lens['a'], lens[endOfBlock], lens[285], lens[286] = 1, 2, 2, 1
	codes := canonical(lens[:286])
	for before := outSize - 400; before < outSize-200; before++ {
		for literals := 20; literals < 48; literals += 3 {
			w := newBits()
			w.dynamic(286, lens)
			add := func(literals int) {
				for range literals {
					w.code(codes['a'], 1)
				}
				w.code(codes[285], 2)
				w.put(0, 1) // distance 1
			}
			first := 1 + (before-1)%258
			add(first)
			for range (before-first)/258 - 1 {
				add(0)
			}
			add(literals)
			w.code(codes[endOfBlock], 2)
			plain := bytes.Repeat([]byte("a"), before+literals+258)
			if have, err := read(bytes.NewReader(member(w.bytes(), plain))); err != nil || !bytes.Equal(have, plain) {
				t.Fatalf("%d literals after %d bytes: %d bytes and error %v; there are %d", literals, before, len(have), err, len(plain))
			}
		}
	}
}

// FuzzReader compares the two libraries.
func FuzzReader(f *testing.F) {
	for _, plain := range plains() {
		f.Add(packed(f, plain[:min(len(plain), 5000)], 6))
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		if len(stream) > 1<<20 {
			return
		}
		same(t, stream)
		// The same blocks in a member that both can find good.
		if plain, err := expected(member(stream, nil)); err == nil || errors.Is(err, gzip.ErrChecksum) {
			same(t, member(stream, plain))
		}
	})
}

// BenchmarkReader has both libraries.
func BenchmarkReader(b *testing.B) {
	plain := plains()["words"]
	stream := packed(b, plain, 6)
	for name, open := range map[string]func() (io.Reader, error){
		"ours":      func() (io.Reader, error) { return NewReader(bytes.NewReader(stream)) },
		"klauspost": func() (io.Reader, error) { return gzip.NewReader(bytes.NewReader(stream)) },
	} {
		b.Run(name, func(b *testing.B) {
			buf := make([]byte, 1<<20)
			b.SetBytes(int64(len(plain)))
			for b.Loop() {
				r, err := open()
				for err == nil {
					_, err = r.Read(buf)
				}
				if err != io.EOF {
					b.Fatal(err)
				}
			}
		})
	}
}

// Package twosums takes two SHA-256 sums of the same bytes at once. The bytes of a file in a
// tar count for the sum of the file and for that of the stream, which are in different states.
//
// On amd64 both share what a block of 64 bytes costs beside its rounds, and the rounds of one
// fill the time for which those of the other wait: together they take two thirds of the time. On other
// processors it is one sum after the other. crypto/sha256 does all but whole blocks.
package twosums

import (
	"encoding"
	"encoding/binary"
	"hash"
)

const (
	block = 64
	// fewest is how many bytes are worth the exchange of states.
	fewest = 8 * block
)

// Writer adds bytes to two hashes. It is for one goroutine; the zero value is ready.
type Writer struct{ a, b state }

// Write adds p to two hashes of crypto/sha256 (not SHA-224). They must not be the same one.
func (w *Writer) Write(a, b hash.Hash, p []byte) {
	if together && len(p) >= fewest {
		p = p[w.whole(a, b, p):]
	}
	a.Write(p)
	b.Write(p)
}

// whole adds the whole blocks at the beginning of p to both, and returns how many bytes they
// have: 0 when a block is begun in one of them.
func (w *Writer) whole(a, b hash.Hash, p []byte) int {
	if !w.a.of(a) || !w.b.of(b) {
		return 0
	}
	n := len(p) / block * block
	blocks(&w.a.words, &w.b.words, p[:n])
	w.a.into(a, n)
	w.b.into(b, n)
	return n
}

// state is that of a hash between two blocks.
type state struct {
	text  []byte // as crypto/sha256 has it: magic, words, the block that was begun, length
	mem   [len(magic) + 8*4 + block + 8]byte
	words [8]uint32
}

// magic begins the state of a SHA-256. Go keeps the form of states: one version
// restores those of an older one.
const magic = "sha\x03"

// of takes the state out of a hash. It returns false when a block is begun, or the form is
// not the known one.
func (s *state) of(h hash.Hash) bool {
	from, ok := h.(encoding.BinaryAppender)
	if !ok {
		return false
	}
	text, err := from.AppendBinary(s.mem[:0])
	if err != nil || len(text) != len(s.mem) || string(text[:len(magic)]) != magic {
		return false
	}
	s.text = text
	for i := range s.words {
		s.words[i] = binary.BigEndian.Uint32(text[len(magic)+4*i:])
	}
	return s.length()%block == 0
}

func (s *state) length() uint64 { return binary.BigEndian.Uint64(s.text[len(s.text)-8:]) }

// into gives the state, which is n bytes further, back to the hash.
func (s *state) into(h hash.Hash, n int) {
	for i, w := range s.words {
		binary.BigEndian.PutUint32(s.text[len(magic)+4*i:], w)
	}
	binary.BigEndian.PutUint64(s.text[len(s.text)-8:], s.length()+uint64(n))
	if err := h.(encoding.BinaryUnmarshaler).UnmarshalBinary(s.text); err != nil {
		panic(err) // it has made this form itself
	}
}

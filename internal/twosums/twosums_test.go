package twosums

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"hash"
	"math/rand/v2"
	"testing"
)

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(b)
	return b
}

// compare adds the pieces to two hashes at once, of which each has its own beginning, and
// fails unless crypto/sha256 has the same sums.
func compare(t *testing.T, before [2][]byte, pieces ...[]byte) {
	t.Helper()
	var w Writer
	var have, want [2]hash.Hash
	for i, b := range before {
		have[i], want[i] = sha256.New(), sha256.New()
		have[i].Write(b)
		want[i].Write(b)
	}
	for _, p := range pieces {
		w.Write(have[0], have[1], p)
		for i := range want {
			want[i].Write(p)
			if x, y := have[i].Sum(nil), want[i].Sum(nil); !bytes.Equal(x, y) {
				t.Fatalf("hash %d, %d bytes after %d and %d: %x, want %x", i, len(p), len(before[0]), len(before[1]), x, y)
			}
		}
	}
}

// TestWrite: every length, after every kind of beginning, twice.
func TestWrite(t *testing.T) {
	if !together {
		t.Log("this processor takes one sum after the other")
	}
	b := random(4096)
	for n := range 1200 {
		compare(t, [2][]byte{b[:n%7*block], nil}, b[:n], b[n:])
	}
	for _, begun := range []int{1, block - 1, block, block + 1} {
		compare(t, [2][]byte{b[:begun], b[:2*block]}, b, b)
		compare(t, [2][]byte{b[:2*block], b[:begun]}, b, b)
	}
}

// TestTogether: on a processor that is known to have the instructions, they are used.
func TestTogether(t *testing.T) {
	a, b := sha256.New(), sha256.New()
	if n := new(Writer).whole(a, b, random(1000)); together && n != 15*block {
		t.Errorf("%d bytes at once, want %d", n, 15*block)
	}
}

// FuzzWrite: any bytes, split anywhere.
func FuzzWrite(f *testing.F) {
	f.Add(random(1000), uint16(3), uint16(512))
	f.Fuzz(func(t *testing.T, p []byte, begun, split uint16) {
		x, y := min(int(begun), len(p)), min(int(split), len(p))
		compare(t, [2][]byte{p[:x], p[x:]}, p[:y], p[y:], p)
	})
}

func BenchmarkWrite(b *testing.B) {
	for _, n := range []int{500, 4 << 10, 256 << 10} {
		p := random(n)
		for name, write := range map[string]func(x, y hash.Hash, p []byte){
			"together": new(Writer).Write,
			"apart":    func(x, y hash.Hash, p []byte) { x.Write(p); y.Write(p) },
		} {
			b.Run(fmt.Sprint(name, "/", n), func(b *testing.B) {
				x, y := sha256.New(), sha256.New()
				b.SetBytes(int64(n))
				for b.Loop() {
					x.Reset()
					y.Reset()
					write(x, y, p)
				}
			})
		}
	}
}

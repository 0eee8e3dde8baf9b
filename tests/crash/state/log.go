package state

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"

	"github.com/cespare/xxhash/v2"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
)

// Block is the unit that a disk writes whole or not at all.
const Block = 4096

// Log is a log of a recording disk, prepared for cutting.
type Log struct {
	Entries []disk.Entry

	durable []int        // by point: how many entries a flush has made durable
	sums    [][]pieceSum // by entry: the content of its pieces
}

type pieceSum struct {
	block int64
	whole bool
	sum   uint64
}

// NewLog prepares a log.
func NewLog(entries []disk.Entry) *Log {
	l := &Log{
		Entries: entries,
		durable: make([]int, len(entries)+1),
		sums:    make([][]pieceSum, len(entries)),
	}
	for i := range entries {
		e := &entries[i]
		l.durable[i+1] = l.durable[i]
		if e.Kind == disk.Flush {
			l.durable[i+1] = i + 1
		}
		if !e.Touches() {
			continue
		}
		for _, p := range pieces(e) {
			l.sums[i] = append(l.sums[i], pieceSum{p.Offset / Block, p.Length == Block, sum(e, p)})
		}
	}
	return l
}

// pieces cuts the place of an entry at the borders of blocks.
func pieces(e *disk.Entry) []disk.Range {
	var out []disk.Range
	for at, end := e.Offset, e.Offset+e.Length; at < end; {
		next := min((at/Block+1)*Block, end)
		out = append(out, disk.Range{Offset: at, Length: next - at})
		at = next
	}
	return out
}

var zeroes [Block]byte

// sum identifies the bytes of one piece and their place in the block.
func sum(e *disk.Entry, p disk.Range) uint64 {
	return mix64(xxhash.Sum64(pieceOf(e, p)), uint64(p.Offset%Block))
}

// pieceOf returns the bytes of one piece.
func pieceOf(e *disk.Entry, p disk.Range) []byte {
	if e.Kind != disk.Write {
		return zeroes[:p.Length]
	}
	return e.Data[p.Offset-e.Offset:][:p.Length]
}

func mix64(a, b uint64) uint64 {
	var buf [16]byte
	binary.LittleEndian.PutUint64(buf[:], a)
	binary.LittleEndian.PutUint64(buf[8:], b)
	return xxhash.Sum64(buf[:])
}

// Durable returns how many entries are on the medium for certain when the power
// goes at the point.
func (l *Log) Durable(point int) int { return l.durable[point] }

// Volatile returns the indices of the entries that may or may not have reached
// the medium when the power goes at the point.
func (l *Log) Volatile(point int) []int {
	var v []int
	for i := l.durable[point]; i < point; i++ {
		if l.Entries[i].Touches() {
			v = append(v, i)
		}
	}
	return v
}

// choice decides for each piece of a volatile write whether it is on the disk.
// ordinal is the write's place in the volatile part.
type choice func(ordinal int, block int64) bool

// choose returns the choice that a state stands for.
func (l *Log) choose(s State, volatile []int) choice {
	switch s.Class {
	case Flushed:
		return func(int, int64) bool { return false }
	case Drop:
		return func(o int, _ int64) bool { return uint64(o) != s.Number }
	case Keep:
		return func(o int, _ int64) bool { return uint64(o) == s.Number }
	case Subset:
		return chooseSubset(s, len(volatile))
	case Torn:
		return l.chooseTorn(s, volatile)
	case Mix:
		return l.chooseMix(s, volatile)
	}
	return func(int, int64) bool { return true }
}

// random is a stream that depends on nothing but the name of the state.
func random(s State) *rand.Rand {
	return rand.New(rand.NewPCG(s.Number, mix64(uint64(s.Point), uint64(s.Class))))
}

func chooseSubset(s State, n int) choice {
	r := random(s)
	p := []float64{.2, .5, .8}[r.IntN(3)]
	kept := make([]bool, n)
	for i := range kept {
		kept[i] = r.Float64() < p
	}
	return func(o int, _ int64) bool { return kept[o] }
}

// chooseTorn tears one write: only its head, its tail, or single blocks of it
// arrived.
func (l *Log) chooseTorn(s State, volatile []int) choice {
	var torn []int // ordinals of writes that can be torn
	for o, i := range volatile {
		if len(l.sums[i]) > 1 {
			torn = append(torn, o)
		}
	}
	if len(torn) == 0 {
		return func(int, int64) bool { return true }
	}
	r := random(s)
	victim := torn[r.IntN(len(torn))]
	blocks := l.sums[volatile[victim]]
	shape := r.IntN(3)
	border := blocks[1+r.IntN(len(blocks)-1)].block
	return func(o int, block int64) bool {
		switch {
		case o != victim:
			return true
		case shape == 0:
			return block < border
		case shape == 1:
			return block >= border
		}
		return mix64(s.Number, uint64(block))&1 == 0
	}
}

// chooseMix gives every block a version of its own: the first k of the writes to
// it, k from none to all. Of whole blocks only the last one shows, so this is
// any version; of parts of a block it is one state of a disk that writes in
// order.
func (l *Log) chooseMix(s State, volatile []int) choice {
	versions := map[int64]uint64{}
	for _, i := range volatile {
		for _, p := range l.sums[i] {
			versions[p.block]++
		}
	}
	kept := make(map[int64]uint64, len(versions))
	for block, n := range versions {
		kept[block] = mix64(mix64(s.Number, uint64(s.Point)), uint64(block)) % (n + 1)
	}
	// choices are queried in the order of the log.
	return func(_ int, block int64) bool {
		if kept[block] == 0 {
			return false
		}
		kept[block]--
		return true
	}
}

// Make puts the volatile writes of a state onto an image that holds everything
// durable, and returns the places that it changed.
func (l *Log) Make(s State, image []byte) []disk.Range {
	var changed []disk.Range
	volatile := l.Volatile(s.Point)
	keep := l.choose(s, volatile)
	for o, i := range volatile {
		e := &l.Entries[i]
		for _, p := range pieces(e) {
			if !keep(o, p.Offset/Block) {
				continue
			}
			copy(image[p.Offset:], pieceOf(e, p))
			if n := len(changed); n > 0 && changed[n-1].Offset+changed[n-1].Length == p.Offset {
				changed[n-1].Length += p.Length
			} else {
				changed = append(changed, p)
			}
		}
	}
	return changed
}

// BeforeFlush is whether a case is of the moment right before a flush of the disk's cache.
func (l *Log) BeforeFlush(c Case) bool {
	return slices.ContainsFunc(c.Points, func(p int) bool { return p < len(l.Entries) && l.Entries[p].Kind == disk.Flush })
}

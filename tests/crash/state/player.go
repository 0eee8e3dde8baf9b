package state

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
)

// Medium is a disk to put states on; *disk.Disk and *disk.Plain are.
type Medium interface {
	Image() []byte
	InMemory() ([]disk.Range, error) // whole blocks; all others are zero
	Clear(disk.Range) error          // makes whole blocks of the image zero
	DropCache() error
	Watch() error
	Touched() ([]disk.Range, error) // since Watch; it may name places that were not, and leave out holes in memory
}

// Player puts states onto a disk, one after another. Nothing may be
// mounted meanwhile; between two states the disk may be mounted and written to.
//
// The loop device stays attached: a state costs the copying of what differs
// from the durable part, and of what the examination of the previous state has
// written.
type Player struct {
	d      Medium
	log    *Log
	base   *Image       // before the log, shared with others, not changed
	golden *Image       // base and the first at entries
	at     int          //
	ours   []disk.Range // where golden is not zero, and what of a state was laid on it
	fresh  bool         // the image holds golden, but for ours and what Touched returns
}

// NewPlayer returns a player for a log that began on the image base. The disk
// must have the size of base; what it holds is overwritten.
func NewPlayer(d Medium, base *Image, l *Log) (*Player, error) {
	if base.Size != int64(len(d.Image())) {
		return nil, fmt.Errorf("play log: a base of %d bytes on a disk of %d", base.Size, len(d.Image()))
	}
	for i := range l.Entries {
		e := &l.Entries[i]
		if e.Touches() && (e.Offset < 0 || e.Offset+e.Length > base.Size) {
			return nil, fmt.Errorf("play log: entry %d, %s, is outside of the disk of %d bytes", i, e, base.Size)
		}
	}
	return &Player{d: d, log: l, base: base, golden: base.Clone()}, nil
}

// Set makes the disk that of the state. From then on the disk only watches
// where it is written to.
func (p *Player) Set(s State) error {
	if s.Point > len(p.log.Entries) {
		return fmt.Errorf("state %s: the log has %d entries", s, len(p.log.Entries))
	}
	if err := p.seek(p.log.Durable(s.Point)); err != nil {
		return fmt.Errorf("state %s: %w", s, err)
	}
	p.ours = append(p.ours, p.log.Make(s, p.d.Image())...)
	if err := p.d.DropCache(); err != nil {
		return fmt.Errorf("state %s: %w", s, err)
	}
	if err := p.d.Watch(); err != nil {
		return fmt.Errorf("state %s: %w", s, err)
	}
	return nil
}

// seek brings golden and the image to the first n entries.
func (p *Player) seek(n int) error {
	if n < p.at {
		p.golden, p.at, p.fresh = p.base.Clone(), 0, false
	}
	if p.fresh {
		if err := p.restore(); err != nil {
			return err
		}
	}
	image := p.d.Image()
	for ; p.at < n; p.at++ {
		e := &p.log.Entries[p.at]
		p.golden.Apply(e)
		if p.fresh && e.Touches() {
			e.Apply(image)
			p.ours = append(p.ours, disk.Range{Offset: e.Offset, Length: e.Length})
		}
	}
	if p.fresh {
		return nil
	}
	p.fresh, p.ours = true, nil
	if err := p.d.Clear(disk.Range{Length: p.base.Size}); err != nil {
		return err
	}
	for n, block := range p.golden.blocks {
		copy(image[n*Block:], block)
		p.ours = append(p.ours, disk.Range{Offset: n * Block, Length: Block})
	}
	return nil
}

// restore makes the image equal to golden. Blocks that are zero there give their
// memory back: else a Plain would name them from then on.
func (p *Player) restore() error {
	image := p.d.Image()
	touched, err := p.d.Touched()
	if err != nil {
		return err
	}
	places := union(append(p.ours, touched...))
	p.ours = nil
	for _, r := range places {
		for at, end := r.Offset, r.Offset+r.Length; at < end; {
			from := at
			if _, ok := p.golden.blocks[at/Block]; !ok {
				for !ok && at < end {
					at += Block
					_, ok = p.golden.blocks[at/Block]
				}
				if err := p.d.Clear(disk.Range{Offset: from, Length: at - from}); err != nil {
					return err
				}
				continue
			}
			for ; at < end; at += Block {
				block, ok := p.golden.blocks[at/Block]
				if !ok {
					break
				}
				// Most of what a Plain names was not written to.
				if !bytes.Equal(image[at:at+Block], block) {
					copy(image[at:], block)
				}
			}
			p.ours = append(p.ours, disk.Range{Offset: from, Length: at - from})
		}
	}
	return nil
}

// union returns the blocks that the ranges touch, in order, each once. It changes ranges.
func union(ranges []disk.Range) []disk.Range {
	slices.SortFunc(ranges, func(a, b disk.Range) int { return cmp.Compare(a.Offset, b.Offset) })
	out := ranges[:0]
	for _, r := range ranges {
		from, end := r.Offset-r.Offset%Block, (r.Offset+r.Length+Block-1)/Block*Block
		if n := len(out); n > 0 && from <= out[n-1].Offset+out[n-1].Length {
			out[n-1].Length = max(out[n-1].Length, end-out[n-1].Offset)
		} else {
			out = append(out, disk.Range{Offset: from, Length: end - from})
		}
	}
	return out
}

// Forget notifies the player that another process has used the disk: the next Set
// begins with a whole copy.
func (p *Player) Forget() { p.fresh = false }

package state

import (
	"bytes"
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
	Touched() ([]disk.Range, error) // since Watch; it may name places that were not
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
	dirty  []disk.Range // where the image differs from golden, by our doing
	fresh  bool         // the image holds golden and dirty, and what Touched returns
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
	p.dirty = p.log.Make(s, p.d.Image())
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
		p.golden.Apply(&p.log.Entries[p.at])
		if p.fresh {
			p.log.Entries[p.at].Apply(image)
		}
	}
	if p.fresh {
		return nil
	}
	p.fresh = true
	if err := p.d.Clear(disk.Range{Length: p.base.Size}); err != nil {
		return err
	}
	for n, block := range p.golden.blocks {
		copy(image[n*Block:], block)
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
	var zero disk.Range // adjacent blocks
	for _, r := range slices.Concat(touched, p.dirty) {
		for at := r.Offset - r.Offset%Block; at < r.Offset+r.Length; at += Block {
			if block, ok := p.golden.blocks[at/Block]; ok {
				// Most of what a Plain names was not written to.
				if !bytes.Equal(image[at:at+Block], block) {
					copy(image[at:], block)
				}
				continue
			}
			if zero.Offset+zero.Length != at {
				if err := p.d.Clear(zero); err != nil {
					return err
				}
				zero = disk.Range{Offset: at}
			}
			zero.Length += Block
		}
	}
	return p.d.Clear(zero)
}

// Forget notifies the player that another process has used the disk: the next Set
// begins with a whole copy.
func (p *Player) Forget() { p.fresh = false }

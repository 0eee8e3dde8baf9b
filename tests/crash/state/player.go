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
	Clear() error // makes the image all zeroes
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
	base   []byte       // the image before the log, shared with others, not written
	golden []byte       // base and the first at entries
	at     int          //
	dirty  []disk.Range // where the image differs from golden, by our doing
	fresh  bool         // the image holds golden and dirty, and what Touched returns
}

// NewPlayer returns a player for a log that began on the image base. The disk
// must have the size of base; what it holds is overwritten.
func NewPlayer(d Medium, base []byte, l *Log) (*Player, error) {
	if len(base) != len(d.Image()) {
		return nil, fmt.Errorf("play log: a base of %d bytes on a disk of %d", len(base), len(d.Image()))
	}
	for i := range l.Entries {
		e := &l.Entries[i]
		if e.Touches() && (e.Offset < 0 || e.Offset+e.Length > int64(len(base))) {
			return nil, fmt.Errorf("play log: entry %d, %s, is outside of the disk of %d bytes", i, e, len(base))
		}
	}
	return &Player{d: d, log: l, base: base, golden: bytes.Clone(base)}, nil
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
	image := p.d.Image()
	if n < p.at {
		copy(p.golden, p.base)
		p.at, p.fresh = 0, false
	}
	if p.fresh {
		if err := p.restore(); err != nil {
			return err
		}
	}
	for ; p.at < n; p.at++ {
		p.log.Entries[p.at].Apply(p.golden)
		if p.fresh {
			p.log.Entries[p.at].Apply(image)
		}
	}
	if p.fresh {
		return nil
	}
	p.fresh = true
	if err := p.d.Clear(); err != nil {
		return err
	}
	eachBlock(disk.Range{Length: int64(len(image))}, func(from, to int64) {
		if !bytes.Equal(p.golden[from:to], zeroes[:to-from]) {
			copy(image[from:to], p.golden[from:to])
		}
	})
	return nil
}

// restore makes the image equal to golden.
func (p *Player) restore() error {
	image := p.d.Image()
	touched, err := p.d.Touched()
	if err != nil {
		return err
	}
	for _, r := range slices.Concat(touched, p.dirty) {
		// Most of what a Plain names was not written to.
		eachBlock(r, func(from, to int64) {
			if !bytes.Equal(image[from:to], p.golden[from:to]) {
				copy(image[from:to], p.golden[from:to])
			}
		})
	}
	return nil
}

func eachBlock(r disk.Range, do func(from, to int64)) {
	for at, end := r.Offset, r.Offset+r.Length; at < end; at += Block {
		do(at, min(at+Block, end))
	}
}

// Forget notifies the player that another process has used the disk: the next Set
// begins with a whole copy.
func (p *Player) Forget() { p.fresh = false }

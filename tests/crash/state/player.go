package state

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
)

// Player puts states onto a recording disk, one after another. Nothing may be
// mounted meanwhile; between two states the disk may be mounted and written to.
//
// The loop device stays attached: a state costs the copying of what differs
// from the durable part, and of what the look at the previous state has
// written.
type Player struct {
	d      *disk.Disk
	log    *Log
	base   []byte       // the image before the log, shared with others, not written
	golden []byte       // base and the first at entries
	at     int          //
	dirty  []disk.Range // where the image differs from golden, by our doing
	fresh  bool         // the image holds golden and dirty, and what Touched tells
}

// NewPlayer returns a player for a log that began on the image base. The disk
// must have the size of base; what it holds is overwritten.
func NewPlayer(d *disk.Disk, base []byte, l *Log) (*Player, error) {
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

// Set makes the disk what the state says. From then on the disk only watches
// where it is written to.
func (p *Player) Set(s State) error {
	if s.Point > len(p.log.Entries) {
		return fmt.Errorf("state %s: the log has %d entries", s, len(p.log.Entries))
	}
	if err := p.restore(); err != nil {
		return fmt.Errorf("state %s: %w", s, err)
	}
	p.seek(p.log.Durable(s.Point))
	p.dirty = p.log.Make(s, p.d.Image())
	if err := p.d.DropCache(); err != nil {
		return fmt.Errorf("state %s: %w", s, err)
	}
	return nil
}

// restore makes the image equal to golden.
func (p *Player) restore() error {
	image := p.d.Image()
	if !p.fresh {
		if err := p.d.Watch(); err != nil {
			return err
		}
		copy(image, p.golden)
		p.dirty, p.fresh = nil, true
		return nil
	}
	touched, err := p.d.Touched()
	if err != nil {
		return err
	}
	for _, r := range slices.Concat(touched, p.dirty) {
		copy(image[r.Offset:r.Offset+r.Length], p.golden[r.Offset:])
	}
	p.dirty = nil
	return nil
}

// seek brings golden and the image to the first n entries.
func (p *Player) seek(n int) {
	image := p.d.Image()
	if n < p.at {
		copy(p.golden, p.base)
		copy(image, p.base)
		p.at = 0
	}
	for ; p.at < n; p.at++ {
		p.log.Entries[p.at].Apply(p.golden)
		p.log.Entries[p.at].Apply(image)
	}
}

// Forget tells the player that somebody else has used the disk: the next Set
// begins with a whole copy.
func (p *Player) Forget() { p.fresh = false }

package storage

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
)

// plain decodes a record of the form that Encode gives it nearly always, in less than half the time of
// encoding/json, which decodes all others: a JSON object with some fields in a known order, without white
// space, with numbers that are not negative, and with strings of printable ASCII without escapes.
type plain struct {
	left      []byte
	separator byte // before the next field
	failed    bool // the record is not of this form, or a value is not what its field takes
}

// commit decodes a CommitEntry. Strings that it has in common with the entry before are in memory once.
func (p *plain) commit(e, before *CommitEntry) {
	p.number("sequence", &e.Sequence)
	p.number("id", &e.ID)
	p.text("name", &e.Name)
	p.text("namespace", &e.Namespace, before.Namespace)
	p.text("chain_id", &e.ChainID, e.Name)
	p.text("parent", &e.Parent, before.Name, before.Parent)
	p.text("diff_id", &e.DiffID, e.ChainID) // the same for the base of a chain
	p.count("entries", &e.Entries)
	p.count("bytes", &e.Bytes)
	p.text("digest", &e.Digest)
	p.time("time", &e.Time)
	p.text("strategy", (*string)(&e.Strategy), string(before.Strategy))
	p.text("boot_id", &e.BootID, before.BootID)
	p.text("run_id", &e.RunID, before.RunID)
	p.number("epoch", &e.Epoch)
	p.time("removed", &e.Removed)
}

// state decodes the StateEntry of a layer whose tree has a digest. Findings are not plain.
func (p *plain) state(e, before *StateEntry, tree string) {
	p.number("id", &e.ID)
	p.text("state", (*string)(&e.State), string(before.State))
	p.number("epoch", &e.Epoch)
	p.time("checked", &e.Checked)
	p.time("deep", &e.Deep)
	p.text("reason", &e.Reason, before.Reason)
	p.text("depth", (*string)(&e.Depth), string(before.Depth))
	p.text("tree", &e.Tree, tree)
	p.text("contents", &e.Contents)
}

// decodePlain is layout.Decode into a zero value, with fields to try first.
func decodePlain[E any](data []byte, fields func(*plain, *E)) (*E, error) {
	e := new(E)
	payload, err := layout.Payload(data)
	if err != nil {
		return e, err
	}
	p := plain{left: payload, separator: '{'}
	if fields(&p, e); p.taken() {
		return e, nil
	}
	*e = *new(E)
	return e, layout.Decode(data, e)
}

// taken reports whether that was all of the record.
func (p *plain) taken() bool { return !p.failed && p.separator == ',' && string(p.left) == "}" }

// field reports whether the next field has a key, and moves to its value.
func (p *plain) field(key string) bool {
	n := len(key) + 4
	if p.failed || len(p.left) < n || p.left[0] != p.separator || p.left[1] != '"' || string(p.left[2:n-2]) != key || string(p.left[n-2:n]) != `":` {
		return false
	}
	p.left, p.separator = p.left[n:], ','
	return true
}

// bytes reads a string.
func (p *plain) bytes() []byte {
	if len(p.left) > 0 && p.left[0] == '"' {
		for i, c := range p.left[1:] {
			if c == '"' {
				s := p.left[1 : 1+i]
				p.left = p.left[2+i:]
				return s
			}
			if c < ' ' || c > '~' || c == '\\' {
				break
			}
		}
	}
	p.failed = true
	return nil
}

// text reads a string, into the memory of one of the others if it is the end of that.
func (p *plain) text(key string, to *string, others ...string) {
	if !p.field(key) {
		return
	}
	b := p.bytes()
	for _, s := range others {
		if at := len(s) - len(b); at >= 0 && s[at:] == string(b) {
			*to = s[at:]
			return
		}
	}
	*to = string(b)
}

func (p *plain) number(key string, to *uint64) {
	if !p.field(key) {
		return
	}
	n := 0
	for n < len(p.left) && p.left[n] >= '0' && p.left[n] <= '9' {
		n++
	}
	value, err := strconv.ParseUint(string(p.left[:n]), 10, 64)
	if err != nil || n > 1 && p.left[0] == '0' {
		p.failed = true
		return
	}
	*to, p.left = value, p.left[n:]
}

func (p *plain) count(key string, to *int64) {
	var value uint64
	p.number(key, &value)
	if *to = int64(value); *to < 0 {
		p.failed = true
	}
}

// time reads what time.Time.UnmarshalJSON reads.
func (p *plain) time(key string, to *time.Time) {
	if p.field(key) && to.UnmarshalText(p.bytes()) != nil {
		p.failed = true
	}
}

// eachRecord visits the records of a bucket with their ids.
func eachRecord(b *bolt.Bucket, fn func(id uint64, data []byte) error) error {
	return b.ForEach(func(k, data []byte) error {
		if len(k) != 8 {
			return fmt.Errorf("journal entry %x: key of %d bytes: %w", k, len(k), layout.ErrCorrupt)
		}
		return fn(binary.BigEndian.Uint64(k), data)
	})
}

func inEntry(id uint64, err error) error {
	if err != nil {
		return fmt.Errorf("journal entry %d: %w", id, err)
	}
	return nil
}

// decodeAll decodes the entries of committed snapshots and their states.
func (j *Journal) decodeAll() (*entries, error) {
	all := &entries{committed: map[uint64]*CommitEntry{}, states: map[uint64]*StateEntry{}}
	before := &CommitEntry{}
	err := eachRecord(j.committed, func(id uint64, data []byte) (err error) {
		before, err = decodePlain(data, func(p *plain, e *CommitEntry) { p.commit(e, before) })
		all.committed[id] = before
		return inEntry(id, err)
	})
	if err != nil || j.states == nil {
		return all, err
	}
	last := &StateEntry{}
	return all, eachRecord(j.states, func(id uint64, data []byte) (err error) {
		tree := ""
		if e := all.committed[id]; e != nil {
			tree = e.Digest
		}
		last, err = decodePlain(data, func(p *plain, e *StateEntry) { p.state(e, last, tree) })
		all.states[id] = last
		return inEntry(id, err)
	})
}

package storage

import (
	"fmt"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
)

// Run is the journal's word on the daemon that has, or had, the root. Out of it
// the next one learns whether the machine went down under it.
type Run struct {
	BootID  string    `json:"boot_id"` // of the kernel (random(4))
	RunID   string    `json:"run_id"`
	Epoch   uint64    `json:"epoch"` // unclean boots seen so far
	Started time.Time `json:"started"`
	Stopped time.Time `json:"stopped,omitzero"` // set by a clean stop
}

// StateEntry is the journal's word on what a look at a committed snapshot has
// found. A snapshot without one was not looked at since its Commit.
type StateEntry struct {
	ID       uint64         `json:"id"`
	State    string         `json:"state"`              // one of the State constants
	Epoch    uint64         `json:"epoch"`              // in which it was looked at
	Checked  time.Time      `json:"checked,omitzero"`   // when
	Deep     time.Time      `json:"deep,omitzero"`      // when its content was compared and found whole
	Findings []seal.Finding `json:"findings,omitempty"` // the first, of a damaged one
	Reason   string         `json:"reason,omitempty"`   // why it is damaged still

	// Contents is the digest of the content digests beside the seal, when there
	// are any.
	Contents string `json:"contents,omitempty"`
	// Healing is set while the tree is being replaced: the entry of the new one.
	// Which of the two is there after a crash, its record tells.
	Healing *CommitEntry `json:"healing,omitempty"`
}

// Values of StateEntry.State.
const (
	// StateReady: it is what its seal says.
	StateReady = "ready"
	// StateUnverified: nobody has looked since the machine went down, or
	// nobody can, because it has no seal.
	StateUnverified = "unverified"
	// StateDamaged: it is not what its seal says.
	StateDamaged = "damaged"
	// StateHealing: it is damaged and being extracted again.
	StateHealing = "healing"
)

// Scrub is how far a periodic verification is.
type Scrub struct {
	Depth    string    `json:"depth"`             // metadata or content
	Started  time.Time `json:"started,omitzero"`  // of the round in work, or of the last one
	Finished time.Time `json:"finished,omitzero"` // of that round; zero while it is in work
	Next     uint64    `json:"next"`              // the lowest id that was not looked at in this round
	Looked   int       `json:"looked"`            // snapshots of this round
	Damaged  int       `json:"damaged"`           // of them
}

// PutState writes what a look has found, replacing an older one.
func (j *Journal) PutState(e StateEntry) error { return put(j.states, e.ID, e) }

// GetState returns what the last look has found, or ErrNoEntry.
func (j *Journal) GetState(id uint64) (StateEntry, error) {
	if j.states == nil {
		return StateEntry{}, ErrNoEntry // a journal of version 1, opened for a look only
	}
	return get[StateEntry](j.states, id)
}

// EachState visits what looks have found. The visitor may not write to the
// journal.
func (j *Journal) EachState(fn func(StateEntry) error) error {
	if j.states == nil {
		return nil
	}
	return each(j.states, fn)
}

// Replace changes the entry of a committed snapshot whose tree was replaced; its
// sequence number stays. ErrNoEntry when there is none.
func (j *Journal) Replace(e CommitEntry) error {
	old, err := j.GetCommitted(e.ID)
	if err != nil {
		return err
	}
	e.Sequence = old.Sequence
	return put(j.committed, e.ID, e)
}

// Run returns the entry of the last daemon; a zero one when there was none.
func (j *Journal) Run() (Run, error) { return single[Run](j.top, keyRun) }

// PutRun replaces the entry of the last daemon.
func (j *Journal) PutRun(r Run) error { return putSingle(j.top, keyRun, r) }

// Scrub returns how far periodic verification is; zero when it never began.
func (j *Journal) Scrub() (Scrub, error) { return single[Scrub](j.top, keyScrub) }

// PutScrub writes how far periodic verification is.
func (j *Journal) PutScrub(s Scrub) error { return putSingle(j.top, keyScrub, s) }

func single[E any](b *bolt.Bucket, key []byte) (e E, err error) {
	data := b.Get(key)
	if data == nil {
		return e, nil
	}
	if err := Decode(data, &e); err != nil {
		return e, fmt.Errorf("journal entry %q: %w", key, err)
	}
	return e, nil
}

func putSingle(b *bolt.Bucket, key []byte, v any) error {
	data, err := Encode(v)
	if err != nil {
		return err
	}
	return b.Put(key, data)
}

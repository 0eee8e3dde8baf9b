package storage

import (
	"fmt"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
)

// Run is the journal's record of the daemon that has, or had, the root. The next daemon
// derives from it whether the shutdown was unclean.
type Run struct {
	BootID  string    `json:"boot_id"` // of the kernel (random(4))
	RunID   string    `json:"run_id"`
	Epoch   uint64    `json:"epoch"` // 1, and one more with each unclean shutdown
	Started time.Time `json:"started"`
	Stopped time.Time `json:"stopped,omitzero"` // set by a clean stop
	// Brake is why damaged layers are neither healed nor reported for dropping
	// until an operator decides; "" when they are.
	Brake string `json:"brake,omitempty"`
	// BrakeHeals: healing is stopped, too, and not only the dropping of images.
	BrakeHeals bool `json:"brake_heals,omitempty"`
	// SnapshotsMounted: snapshots/ was a mount of its own. If it is none now, and
	// has no layer in it, its file system is not mounted.
	SnapshotsMounted bool `json:"snapshots_mounted,omitempty"`
	// ImagesEpoch is the epoch in which all images were last checked. When it is not that
	// of the run, a check is due.
	ImagesEpoch uint64 `json:"images_epoch,omitempty"`
}

// Depth is how much of a layer a verification compares. Damage that was found at
// one depth is not disproved by a verification at a lower one.
type Depth string

// The depths, the lowest first. The zero value is lower than all of them.
const (
	// DepthRoot: one lstat of the layer's root.
	DepthRoot Depth = "root"
	// DepthMetadata: every entry with its attributes, by the seal.
	DepthMetadata Depth = "metadata"
	// DepthContent: the content of every file, too.
	DepthContent Depth = "content"
)

// Covers reports whether a verification at depth d sees what one at depth o sees.
func (d Depth) Covers(o Depth) bool { return d.rank() >= o.rank() }

func (d Depth) rank() int {
	return slices.Index([]Depth{"", DepthRoot, DepthMetadata, DepthContent}, d)
}

// StateEntry is the journal's record of the last verification of a committed snapshot.
// A snapshot without one was not verified since its Commit.
type StateEntry struct {
	ID       uint64            `json:"id"`
	State    State             `json:"state"`
	Epoch    uint64            `json:"epoch"`              // in which it was verified
	Checked  time.Time         `json:"checked,omitzero"`   // when, by the wall clock: for operators, never an order of events
	Deep     time.Time         `json:"deep,omitzero"`      // when its content was last compared without a difference
	Findings []finding.Finding `json:"findings,omitempty"` // the first, of a damaged one
	Reason   string            `json:"reason,omitempty"`   // why it is damaged still

	// Depth is that of the verification that found the damage: only one that
	// covers it, or a heal, makes the layer ready again. "" in entries of older
	// versions, which may mean any depth.
	Depth Depth `json:"depth,omitempty"`
	// Tree is the digest of the seal of the tree that State is about. After that
	// tree was exchanged the entry means nothing. "" in entries of older versions.
	Tree string `json:"tree,omitempty"`
	// Reported: a caller was refused this layer, and containerd has not been
	// notified since then that it is ready.
	Reported bool `json:"reported,omitempty"`

	// Attempts counts the heals that were interrupted because the daemon ended: the
	// content of the blob may have ended it.
	Attempts int `json:"attempts,omitempty"`

	// Contents is the digest of the content digests beside the seal, when there
	// are any.
	Contents string `json:"contents,omitempty"`
	// Healing is set while the tree is being replaced: the entry of the new one.
	// After a crash, the record beside the tree shows which of the two is there.
	Healing *CommitEntry `json:"healing,omitempty"`
}

// State is what is known of a committed layer.
type State string

const (
	// StateReady: it matches its seal.
	StateReady State = "ready"
	// StateUnverified: it was not verified since an unclean shutdown, or cannot be,
	// because it has no seal.
	StateUnverified State = "unverified"
	// StateDamaged: it does not match its seal.
	StateDamaged State = "damaged"
	// StateHealing: it is damaged and being extracted again.
	StateHealing State = "healing"
)

// Scrub is the progress of periodic verification.
type Scrub struct {
	Depth    Depth     `json:"depth"`             // metadata or content
	Started  time.Time `json:"started,omitzero"`  // of the round in work, or of the last one
	Finished time.Time `json:"finished,omitzero"` // of that round; zero while it is in work
	Next     uint64    `json:"next"`              // the lowest id that was not verified in this round
	Verified int       `json:"looked"`            // snapshots of this round
	Damaged  int       `json:"damaged"`           // of them
}

// PutState writes the result of a verification. It replaces an older one.
func (j *Journal) PutState(e StateEntry) error { return put(j.states, e.ID, e) }

// GetState returns the result of the last verification, or ErrNoEntry.
func (j *Journal) GetState(id uint64) (StateEntry, error) {
	if j.states == nil {
		return StateEntry{}, ErrNoEntry // a journal of version 1 that was opened read-only
	}
	if j.known != nil {
		if e := j.known.states[id]; e != nil {
			return *e, nil
		}
	}
	return get[StateEntry](j.states, id)
}

// EachState visits the results of the last verifications. The visitor must not write to
// the journal.
func (j *Journal) EachState(fn func(StateEntry) error) error {
	if j.states == nil {
		return nil
	}
	return each(j.states, ignoringID(fn))
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

// Scrub returns the progress of periodic verification; zero when it never began.
func (j *Journal) Scrub() (Scrub, error) { return single[Scrub](j.top, keyScrub) }

// PutScrub writes the progress of periodic verification.
func (j *Journal) PutScrub(s Scrub) error { return putSingle(j.top, keyScrub, s) }

func single[E any](b *bolt.Bucket, key []byte) (e E, err error) {
	data := b.Get(key)
	if data == nil {
		return e, nil
	}
	if err := layout.Decode(data, &e); err != nil {
		return e, fmt.Errorf("journal entry %q: %w", key, err)
	}
	return e, nil
}

func putSingle(b *bolt.Bucket, key []byte, v any) error {
	data, err := layout.Encode(v)
	if err != nil {
		return err
	}
	return b.Put(key, data)
}

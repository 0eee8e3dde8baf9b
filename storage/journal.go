package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
)

// OpenEntry is the journal's record of an active snapshot, which is being written and
// of which nothing is promised.
type OpenEntry struct {
	ID         uint64    `json:"id"`                    // directory number
	Key        string    `json:"key"`                   // containerd's active key
	Extraction bool      `json:"extraction"`            // a layer being unpacked, not a container
	ChainID    string    `json:"chain_id,omitempty"`    // of the layer being unpacked, when known
	Parent     string    `json:"parent,omitempty"`      // a committed name
	Started    time.Time `json:"started"`               // time of Prepare
	BootID     string    `json:"boot_id"`               // of the kernel that ran then
	RunID      string    `json:"run_id"`                // of the daemon that held the cursor
	Abandoned  time.Time `json:"abandoned,omitzero"`    // when a later daemon closed this extraction
	Poisoned   string    `json:"poisoned,omitempty"`    // the I/O error after which it cannot be committed
	CursorLost bool      `json:"cursor_lost,omitempty"` // a daemon ended since; errors of its time are unknown
}

// CommitEntry is the journal's record of a committed snapshot: everything below
// its directory was durable before this entry was written.
type CommitEntry struct {
	Sequence  uint64    `json:"sequence"`            // order of commits in this database
	ID        uint64    `json:"id"`                  // directory number
	Name      string    `json:"name"`                // containerd's committed name
	Namespace string    `json:"namespace,omitempty"` // containerd's namespace, when the name contains it
	ChainID   string    `json:"chain_id,omitempty"`  // when known
	Parent    string    `json:"parent,omitempty"`    // a committed name
	DiffID    string    `json:"diff_id,omitempty"`   // when containerd sent it as a label
	Entries   int64     `json:"entries"`             // files, directories and so on below fs/, with fs/
	Bytes     int64     `json:"bytes"`               // sum of the sizes of its regular files, hardlinks once
	Digest    string    `json:"digest,omitempty"`    // of the walk, as in the record beside fs/
	Time      time.Time `json:"time"`                // of the commit
	Strategy  Strategy  `json:"strategy"`            // how it was made durable
	BootID    string    `json:"boot_id"`
	RunID     string    `json:"run_id"`
	Epoch     uint64    `json:"epoch,omitempty"`  // that of the commit, see Run
	Removed   time.Time `json:"removed,omitzero"` // set in the history
}

// Ref identifies one tree of one committed layer: the number of its directory, that of
// its commit, and the digest of its seal, "" when it was never sealed.
type Ref struct {
	ID, Sequence uint64
	Digest       string
}

// Ref returns the Ref of the tree that an entry is about.
func (e CommitEntry) Ref() Ref { return Ref{e.ID, e.Sequence, e.Digest} }

// Same reports whether both are the same tree. A heal exchanges the tree of a layer.
func (r Ref) Same(o Ref) bool { return r == o }

// SameLayer reports whether both are the same layer, whichever tree it has. A layer that
// was removed and committed again is another one.
func (r Ref) SameLayer(o Ref) bool { return r.ID == o.ID && r.Sequence == o.Sequence }

// Strategy is how a layer was made durable.
type Strategy string

const (
	// StrategySyncfs: syncfs on the descriptor that was opened at Prepare.
	StrategySyncfs Strategy = "syncfs"
	// StrategySyncfsCursorLost: the same, but the daemon had been restarted
	// since Prepare, so a writeback error of the time before is not known.
	StrategySyncfsCursorLost Strategy = "syncfs, cursor lost"
	// StrategyApplied: at the end of an Apply of ours, on the same descriptor or file by
	// file; Commit has synced what it has changed since.
	StrategyApplied Strategy = "syncfs, in Apply"
	// StrategyRebuilt: found by repair --rebuild, equal to its record, synced.
	StrategyRebuilt Strategy = "rebuilt"
	// StrategyHealed: extracted again by us out of its blob, because it was
	// damaged; synced as with StrategySyncfs.
	StrategyHealed Strategy = "healed"
	// StrategyUnknown: committed by another snapshotter before this database
	// got its journal.
	StrategyUnknown Strategy = "unknown"
)

// ErrNoEntry is returned for a journal entry that does not exist.
var ErrNoEntry = errors.New("no such journal entry")

var (
	bucketJournal   = []byte("journal")
	bucketOpen      = []byte("open")
	bucketCommitted = []byte("committed")
	bucketHistory   = []byte("history")
	bucketStates    = []byte("states")
	keyVersion      = []byte("version")
	keyRun          = []byte("run")
	keyScrub        = []byte("scrub")
)

// journalVersion 2 has states, run and scrub. 3 has the same buckets; it excludes
// older programs, which take seals without link counts for damage. upgrade converts
// both older versions.
const journalVersion = 3

// Journal is the journal inside one transaction. It is valid until the function
// that got it returns.
type Journal struct {
	top, open, committed, history, states *bolt.Bucket
	keep                                  uint64   // length of the history
	known                                 *entries // of this very state, decoded before; nil when none were
}

// journal finds the journal's buckets in a transaction. The error wraps layout.ErrNewer
// or layout.ErrCorrupt, or is errNoJournal.
func journal(tx *bolt.Tx, keep uint64) (*Journal, error) {
	b := tx.Bucket(bucketJournal)
	if b == nil {
		return nil, errNoJournal
	}
	version, n := binary.Uvarint(b.Get(keyVersion))
	switch {
	case n <= 0 || version == 0:
		return nil, fmt.Errorf("journal version: %w", layout.ErrCorrupt)
	case version > journalVersion:
		return nil, fmt.Errorf("journal version %d: %w", version, layout.ErrNewer)
	}
	j := &Journal{
		top: b, open: b.Bucket(bucketOpen), committed: b.Bucket(bucketCommitted), history: b.Bucket(bucketHistory),
		states: b.Bucket(bucketStates), keep: keep,
	}
	if j.open == nil || j.committed == nil || j.history == nil || j.states == nil && version > 1 {
		return nil, fmt.Errorf("journal buckets: %w", layout.ErrCorrupt)
	}
	return j, nil
}

var errNoJournal = errors.New("the database has no journal")

// createJournal makes the empty journal of a new or an adopted database.
func createJournal(tx *bolt.Tx) error {
	b, err := tx.CreateBucket(bucketJournal)
	if err != nil {
		return err
	}
	for _, name := range [][]byte{bucketOpen, bucketCommitted, bucketHistory, bucketStates} {
		if _, err := b.CreateBucket(name); err != nil {
			return err
		}
	}
	return b.Put(keyVersion, binary.AppendUvarint(nil, journalVersion))
}

// PutOpen writes the entry of an active snapshot, replacing an older one.
func (j *Journal) PutOpen(e OpenEntry) error { return put(j.open, e.ID, e) }

// GetOpen returns the entry of an active snapshot, or ErrNoEntry.
func (j *Journal) GetOpen(id uint64) (OpenEntry, error) { return get[OpenEntry](j.open, id) }

// EachOpen visits the entries of all active snapshots. The visitor may not
// write to the journal.
func (j *Journal) EachOpen(fn func(OpenEntry) error) error { return each(j.open, ignoringID(fn)) }

// Commit closes the open entry of e.ID, if there is one, gives e the next
// sequence number, and writes it.
func (j *Journal) Commit(e *CommitEntry) error {
	if err := j.open.Delete(idKey(e.ID)); err != nil {
		return err
	}
	var err error
	if e.Sequence, err = j.committed.NextSequence(); err != nil {
		return err
	}
	return put(j.committed, e.ID, *e)
}

// GetCommitted returns the entry of a committed snapshot that exists, or
// ErrNoEntry.
func (j *Journal) GetCommitted(id uint64) (CommitEntry, error) {
	if j.known != nil {
		if e := j.known.committed[id]; e != nil {
			return *e, nil
		}
	}
	return get[CommitEntry](j.committed, id)
}

// EachCommitted visits the entries of all committed snapshots that exist. The
// visitor may not write to the journal.
func (j *Journal) EachCommitted(fn func(CommitEntry) error) error {
	return each(j.committed, ignoringID(fn))
}

// EachRemoved visits the history, oldest removal first.
func (j *Journal) EachRemoved(fn func(CommitEntry) error) error {
	return each(j.history, ignoringID(fn))
}

// Remove records that a snapshot is gone: it deletes its open entry and its state,
// moves its commit entry to the history, and trims the history to its length.
func (j *Journal) Remove(id uint64, now time.Time) error {
	if err := errors.Join(j.open.Delete(idKey(id)), j.states.Delete(idKey(id))); err != nil {
		return err
	}
	e, err := j.GetCommitted(id)
	if errors.Is(err, ErrNoEntry) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := j.committed.Delete(idKey(id)); err != nil {
		return err
	}
	e.Removed = now
	n, err := j.history.NextSequence()
	if err != nil {
		return err
	}
	if err := put(j.history, n, e); err != nil {
		return err
	}
	return j.trim(n)
}

// trim drops the entries of the history that are older than the last keep ones;
// n is the number of the newest.
func (j *Journal) trim(n uint64) error {
	c := j.history.Cursor()
	for k, _ := c.First(); k != nil; k, _ = c.First() {
		if binary.BigEndian.Uint64(k)+j.keep > n {
			return nil
		}
		if err := c.Delete(); err != nil {
			return err
		}
	}
	return nil
}

func idKey(id uint64) []byte { return binary.BigEndian.AppendUint64(nil, id) }

func put(b *bolt.Bucket, id uint64, v any) error {
	data, err := layout.Encode(v)
	if err != nil {
		return err
	}
	return b.Put(idKey(id), data)
}

func get[E any](b *bolt.Bucket, id uint64) (e E, err error) {
	data := b.Get(idKey(id))
	if data == nil {
		return e, ErrNoEntry
	}
	if err := layout.Decode(data, &e); err != nil {
		return e, inEntry(id, err)
	}
	return e, nil
}

func ignoringID[E any](fn func(E) error) func(uint64, E) error {
	return func(_ uint64, e E) error { return fn(e) }
}

func each[E any](b *bolt.Bucket, fn func(uint64, E) error) error {
	return eachRecord(b, func(id uint64, data []byte) error {
		var e E
		if err := layout.Decode(data, &e); err != nil {
			return inEntry(id, err)
		}
		return fn(id, e)
	})
}

package storage

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	cstorage "github.com/containerd/containerd/v2/core/snapshots/storage"
	bolt "go.etcd.io/bbolt"

	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
)

// errNever ends a transaction that is not to be kept.
var errNever = errors.New("never committed")

// FuzzJournal puts bytes in the place of a value of a healthy database: the journal's
// version, an entry of each kind, or a part of containerd's row of a layer. What verifies
// can be read; whatever else it holds is damage, or of a newer version.
func FuzzJournal(f *testing.F) {
	at := time.Date(2026, 11, 21, 12, 30, 0, 5, time.UTC)
	commit := CommitEntry{Sequence: 1, ID: 1, Name: "layer", Entries: 3, Bytes: 4, Time: at, Strategy: StrategySyncfs, BootID: "b", RunID: "r"}
	for i, v := range []any{
		OpenEntry{ID: 2, Key: "k", Parent: "layer", Started: at, CursorLost: true},
		commit,
		StateEntry{ID: 1, State: StateDamaged, Checked: at, Findings: []finding.Finding{{Path: "a", What: "missing"}}, Healing: &commit},
		CommitEntry{ID: 1, Removed: at},
		Run{BootID: "b", RunID: "r", Started: at},
		Scrub{Depth: DepthContent, Started: at},
	} {
		payload, err := json.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(byte(i), true, idKey(1), payload)
		record, err := layout.Encode(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(byte(i), false, idKey(2), record)
	}
	f.Add(byte(6), false, []byte("x"), binary.AppendUvarint(nil, journalVersion+1))
	for i, field := range []string{"id", "kind", "parent", "createdat", "inodes", "size", "labels"} {
		f.Add(byte(7), false, []byte(field), binary.AppendUvarint(nil, uint64(i)))
	}
	root := f.TempDir()
	db, err := Open(f.Context(), root, Options{History: 3})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = db.Close() })
	err = db.Update(f.Context(), func(ctx context.Context, j *Journal) error {
		if _, err := cstorage.CreateSnapshot(ctx, snapshots.KindActive, "key", ""); err != nil {
			return err
		}
		return errors.Join(Commit(ctx, "key", "layer", snapshots.Usage{Size: 1, Inodes: 2}), j.Commit(&commit))
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, where byte, seal bool, key, value []byte) {
		if seal && json.Valid(value) {
			// So that the fuzzer need not find out checksums.
			record, err := layout.Encode(json.RawMessage(value))
			if err != nil {
				t.Fatal(err)
			}
			value = record
		}
		var verified, read error
		err := db.Update(t.Context(), func(ctx context.Context, j *Journal) error {
			tx := j.top.Tx()
			if err := place(tx, j, where, key, value); err != nil {
				return err
			}
			if verified = withoutPanic(func() error {
				_, err := verifyJournal(tx)
				return err
			}); verified == nil {
				read = withoutPanic(func() error { return readJournal(tx) })
			}
			// A panic of containerd's code is damage to WithTransaction.
			walked := Walk(ctx, func(uint64, snapshots.Info, snapshots.Usage) error { return nil })
			if rows := withoutPanic(func() error { return j.EachRow(func(BareRow) error { return nil }) }); (rows == nil) != (walked == nil) {
				t.Errorf("EachRow: %v; Walk: %v", rows, walked)
			}
			return errors.Join(errNever, walked)
		})
		if verified != nil && !errors.Is(verified, ErrDamaged) && !errors.Is(verified, layout.ErrNewer) {
			t.Errorf("verified: %v", verified)
		}
		if read != nil {
			t.Errorf("is verified, and cannot be read: %v", read)
		}
		if err == nil {
			t.Error("committed")
		}
	})
}

// place writes a value into a transaction.
func place(tx *bolt.Tx, j *Journal, where byte, key, value []byte) error {
	switch where % 8 {
	case 0:
		return j.open.Put(key, value)
	case 1:
		return j.committed.Put(key, value)
	case 2:
		return j.states.Put(key, value)
	case 3:
		return j.history.Put(key, value)
	case 4:
		return j.top.Put(keyRun, value)
	case 5:
		return j.top.Put(keyScrub, value)
	case 6:
		return j.top.Put(keyVersion, value)
	}
	return tx.Bucket([]byte("v1")).Bucket([]byte("snapshots")).Bucket([]byte("layer")).Put(key, value)
}

// readJournal uses what a journal has as the daemon does.
func readJournal(tx *bolt.Tx) error {
	j, err := journal(tx, 3)
	if err != nil {
		return err
	}
	for _, id := range []uint64{1, 2} {
		_, err1 := j.GetOpen(id)
		_, err2 := j.GetCommitted(id)
		_, err3 := j.GetState(id)
		for _, err := range []error{err1, err2, err3} {
			if err != nil && !errors.Is(err, ErrNoEntry) {
				return err
			}
		}
	}
	return errors.Join(j.Remove(1, time.Now()), j.Remove(2, time.Now()))
}

func withoutPanic(fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return fn()
}

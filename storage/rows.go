package storage

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/metadata/boltutil"
	"github.com/containerd/containerd/v2/core/snapshots"
	cstorage "github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// The functions of this file read and write containerd's rows; they need a context
// of a transaction. They exist so that one package knows containerd's storage, and an id
// is a number everywhere else.

// Info returns the row of key: an active key or a committed name. NotFound
// when there is none.
func Info(ctx context.Context, key string) (uint64, snapshots.Info, snapshots.Usage, error) {
	sid, info, usage, err := cstorage.GetInfo(ctx, key)
	if err != nil {
		return 0, info, usage, err
	}
	id, err := strconv.ParseUint(sid, 10, 64)
	return id, info, usage, err
}

// Commit turns the active row key into the committed row name; see containerd's
// storage.CommitActive for its errors.
func Commit(ctx context.Context, key, name string, usage snapshots.Usage, opts ...snapshots.Opt) error {
	_, err := cstorage.CommitActive(ctx, key, name, usage, opts...)
	return err
}

// Remove drops a row. NotFound when there is none, FailedPrecondition when it
// has children.
func Remove(ctx context.Context, key string) error {
	_, _, err := cstorage.Remove(ctx, key)
	return err
}

// Walk visits every row with its id and usage, in the order of the ids, which is that of
// Prepare. The parent of a layer that was unpacked in parallel may come after it.
func Walk(ctx context.Context, fn func(uint64, snapshots.Info, snapshots.Usage) error) error {
	// containerd's own walk does not return the ids, and reads each row whole: with Info
	// for the id, each would be read twice.
	keys, err := Keys(ctx)
	if err != nil {
		return err
	}
	for _, id := range slices.Sorted(maps.Keys(keys)) {
		_, info, usage, err := Info(ctx, keys[id])
		if err != nil {
			return err
		}
		if err := fn(id, info, usage); err != nil {
			return err
		}
	}
	return nil
}

// BareRow is a row without what only its users need; Info has that.
type BareRow struct {
	ID           uint64
	Kind         snapshots.Kind
	Name, Parent string
}

// EachRow is Walk for a start, which reads all rows there are: in one pass, without labels and usage. It
// finds the same errors.
func (j *Journal) EachRow(fn func(BareRow) error) error {
	var rows []BareRow
	if j.known != nil {
		rows = make([]BareRow, 0, len(j.known.committed)+100)
	}
	if err := j.rawRows(func(key []byte, id uint64, row *bolt.Bucket) error {
		var created, updated time.Time
		if err := boltutil.ReadTimestamps(row, &created, &updated); err != nil {
			return err
		}
		r := BareRow{ID: id}
		if kind := row.Get([]byte("kind")); len(kind) == 1 {
			r.Kind = snapshots.Kind(kind[0])
		}
		var e *CommitEntry
		if j.known != nil {
			e = j.known.committed[id]
		}
		if e == nil {
			e = &CommitEntry{}
		}
		r.Name, r.Parent = sameString(e.Name, key), sameString(e.Parent, row.Get([]byte("parent")))
		rows = append(rows, r)
		return nil
	}); err != nil {
		return err
	}
	slices.SortFunc(rows, func(a, b BareRow) int { return cmp.Compare(a.ID, b.ID) })
	for _, r := range rows {
		if err := fn(r); err != nil {
			return err
		}
	}
	return nil
}

// sameString is string(b), in the memory of s if they are equal.
func sameString(s string, b []byte) string {
	if s == string(b) {
		return s
	}
	return string(b)
}

// rawRows visits rows as containerd's storage has them (core/snapshots/storage/bolt.go): a bucket each.
// TestRows compares them with what containerd's functions return.
func (j *Journal) rawRows(fn func(key []byte, id uint64, row *bolt.Bucket) error) error {
	top := j.top.Tx().Bucket([]byte("v1"))
	if top == nil {
		return fmt.Errorf("bucket of containerd's rows: %w", errdefs.ErrNotFound)
	}
	rows := top.Bucket([]byte("snapshots"))
	if rows == nil {
		return fmt.Errorf("bucket of containerd's snapshots: %w", errdefs.ErrNotFound)
	}
	return rows.ForEachBucket(func(key []byte) error {
		row := rows.Bucket(key)
		id, _ := binary.Uvarint(row.Get([]byte("id")))
		return fn(key, id, row)
	})
}

// Keys maps the id of every row to its key or name.
func Keys(ctx context.Context) (map[uint64]string, error) {
	ids, err := cstorage.IDMap(ctx)
	if err != nil {
		return nil, err
	}
	keys := make(map[uint64]string, len(ids))
	for sid, key := range ids {
		id, err := strconv.ParseUint(sid, 10, 64)
		if err != nil {
			return nil, err
		}
		keys[id] = key
	}
	return keys, nil
}

package storage

import (
	"context"
	"maps"
	"slices"
	"strconv"

	"github.com/containerd/containerd/v2/core/snapshots"
	cstorage "github.com/containerd/containerd/v2/core/snapshots/storage"
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

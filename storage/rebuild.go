package storage

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/metadata/boltutil"
	"github.com/containerd/containerd/v2/core/snapshots"
	cstorage "github.com/containerd/containerd/v2/core/snapshots/storage"
	bolt "go.etcd.io/bbolt"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
)

// upgrade gives a database of the built-in overlay snapshotter its journal, and
// an older journal what it lacks. Layers of the built-in snapshotter were never
// synced by us, and their entries record that (StrategyUnknown). Its active snapshots
// get no entries: the caller decides which of them are extractions, and must not let an
// incomplete one be committed.
func (db *DB) upgrade(ctx context.Context) error {
	version := uint64(journalVersion)
	err := inBolt(ctx, db.ms, false, func(tx *bolt.Tx) error {
		j, err := journal(tx, db.keep)
		if err == nil {
			version, _ = binary.Uvarint(j.top.Get(keyVersion))
		}
		return err
	})
	if err == nil && version == journalVersion {
		return nil
	}
	db.known.Store(nil) // what follows writes
	if err == nil {
		return inBolt(ctx, db.ms, true, func(tx *bolt.Tx) error {
			b := tx.Bucket(bucketJournal)
			if _, err := b.CreateBucketIfNotExists(bucketStates); err != nil {
				return err
			}
			return b.Put(keyVersion, binary.AppendUvarint(nil, journalVersion))
		})
	}
	if !errors.Is(err, errNoJournal) {
		return err
	}
	return withJournal(ctx, db.ms, func(ctx context.Context, tx *bolt.Tx, j *Journal) error {
		return Walk(ctx, func(id uint64, info snapshots.Info, _ snapshots.Usage) error {
			if info.Kind != snapshots.KindCommitted {
				return nil
			}
			return j.Commit(&CommitEntry{ID: id, Name: info.Name, Parent: info.Parent, Time: info.Created, Strategy: StrategyUnknown})
		})
	})
}

// withJournal creates the journal of a database that has none and fills it, in
// one transaction.
func withJournal(ctx context.Context, ms *cstorage.MetaStore, fn func(context.Context, *bolt.Tx, *Journal) error) error {
	tctx, trans, err := ms.TransactionContext(ctx, true)
	if err != nil {
		return err
	}
	tx, err := boltTx(trans)
	if err == nil && tx.Bucket(bucketJournal) == nil {
		err = createJournal(tx)
	}
	var j *Journal
	if err == nil {
		j, err = journal(tx, 0)
	}
	if err == nil {
		err = fn(tctx, tx, j)
	}
	if err != nil {
		return errors.Join(err, rollback(trans))
	}
	return trans.Commit()
}

// Row is one snapshot as its own directory describes it.
type Row struct {
	ID     uint64
	Info   snapshots.Info // Name is the key of an active snapshot or a view
	Usage  snapshots.Usage
	Commit CommitEntry // for a committed one
	State  StateEntry  // for a committed one; none when its ID is 0
	Open   OpenEntry   // for an active one
}

// Rebuild makes a new metadata.db out of rows, parents before children. An
// existing database is renamed to metadata.db.damaged-<suffix> and not touched
// otherwise; its new path is returned. The new one appears complete or not at
// all. The caller must not have the root open.
func Rebuild(ctx context.Context, root, suffix string, rows []Row) (aside string, err error) {
	lock, err := lockRoot(ctx, root, passing)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()

	path := filepath.Join(root, FileName)
	next := path + ".new"
	if err := removeIfThere(next); err != nil {
		return "", err
	}
	if err := fill(ctx, next); err != nil {
		return "", err
	}
	if err := insert(ctx, next, rows); err != nil {
		return "", errors.Join(err, removeIfThere(next))
	}
	if _, err := verify(next); err != nil {
		return "", err
	}
	if _, err := os.Lstat(path); err == nil {
		aside = path + ".damaged-" + suffix
		if err := fsync.Rename(path, aside); err != nil {
			return "", err
		}
	}
	return aside, fsync.Rename(next, path)
}

func insert(ctx context.Context, path string, rows []Row) error {
	ms, err := openStore(path)
	if err != nil {
		return err
	}
	err = withJournal(ctx, ms, func(ctx context.Context, tx *bolt.Tx, j *Journal) error {
		b := tx.Bucket([]byte("v1")).Bucket([]byte("snapshots"))
		highest := b.Sequence()
		for _, r := range rows {
			highest = max(highest, r.ID)
			// containerd gives out the next number of this bucket as the id.
			if err := b.SetSequence(r.ID - 1); err != nil {
				return err
			}
			if err := insertRow(ctx, j, r); err != nil {
				return fmt.Errorf("snapshot %d, %q: %w", r.ID, r.Info.Name, err)
			}
			// The times of the rows are those of the rebuild until here.
			if err := boltutil.WriteTimestamps(b.Bucket([]byte(r.Info.Name)), r.Info.Created, r.Info.Updated); err != nil {
				return err
			}
		}
		return b.SetSequence(highest)
	})
	err = errors.Join(err, ms.Close())
	if err != nil {
		return err
	}
	return fsync.File(path)
}

func insertRow(ctx context.Context, j *Journal, r Row) error {
	if r.Info.Kind != snapshots.KindCommitted {
		if _, err := cstorage.CreateSnapshot(ctx, r.Info.Kind, r.Info.Name, r.Info.Parent, snapshots.WithLabels(r.Info.Labels)); err != nil {
			return err
		}
		if r.Info.Kind == snapshots.KindView {
			return nil
		}
		return j.PutOpen(r.Open)
	}
	key := fmt.Sprintf("rebuild-%d", r.ID)
	if _, err := cstorage.CreateSnapshot(ctx, snapshots.KindActive, key, r.Info.Parent); err != nil {
		return err
	}
	if _, err := cstorage.CommitActive(ctx, key, r.Info.Name, r.Usage, snapshots.WithLabels(r.Info.Labels)); err != nil {
		return err
	}
	if err := j.Commit(&r.Commit); err != nil || r.State.ID == 0 {
		return err
	}
	return j.PutState(r.State)
}

package storage_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"

	"github.com/containerd/containerd/v2/core/snapshots"
	cstorage "github.com/containerd/containerd/v2/core/snapshots/storage"

	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// The seam: containerd's snapshotter starts its own transaction, and what BeforeCommit
// was given runs inside, before the commit. Here it puts the journal entry of a new
// snapshot beside the row, and then refuses another one, whose row goes with it.
func ExampleBeforeCommit() {
	root, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(root)
	ctx := context.Background()
	db, err := storage.Open(ctx, root, storage.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer db.Close()

	// containerd's Prepare, in short.
	prepare := func(ctx context.Context, key string) error {
		return db.WithTransaction(ctx, true, func(ctx context.Context) error {
			_, err := cstorage.CreateSnapshot(ctx, snapshots.KindActive, key, "")
			return err
		})
	}
	inTx := func(key string, refuse error) context.Context {
		return storage.BeforeCommit(ctx, func(ctx context.Context, j *storage.Journal) error {
			id, _, _, err := storage.Info(ctx, key)
			if err != nil {
				return err
			}
			return errors.Join(refuse, j.PutOpen(storage.OpenEntry{ID: id, Key: key}))
		})
	}
	fmt.Println(prepare(inTx("first", nil), "first"))
	fmt.Println(prepare(inTx("second", errors.New("its directory cannot be synced")), "second"))

	if err := db.View(ctx, func(ctx context.Context, j *storage.Journal) error {
		return j.EachOpen(func(e storage.OpenEntry) error {
			fmt.Println("in the journal:", e.Key)
			return nil
		})
	}); err != nil {
		log.Fatal(err)
	}
	// Output:
	// <nil>
	// its directory cannot be synced
	// in the journal: first
}

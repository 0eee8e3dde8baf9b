// Package filled puts many committed layers into a root with the means of the program, but without
// containerd's two transactions for each, which would take minutes.
package filled

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Layers are the layers of a root that has no database yet.
type Layers struct {
	root string
	rows []storage.Row

	Entries int64 // of all trees
}

// New returns the layers of a root, of which there are none.
func New(root string) *Layers { return &Layers{root: root} }

// Add adds a layer on another one, or on none, with what fill puts into its tree, which may be nil. It
// returns the name.
func (l *Layers) Add(ctx context.Context, parent string, fill func(tree string) error) (name string, err error) {
	id := uint64(len(l.rows) + 1)
	dir := filepath.Join(l.root, "snapshots", strconv.FormatUint(id, 10))
	tree := filepath.Join(dir, "fs")
	if err := os.MkdirAll(tree, 0o755); err != nil {
		return "", err
	}
	if fill != nil {
		if err := fill(tree); err != nil {
			return "", err
		}
	}
	sealed, err := seal.Write(ctx, tree, filepath.Join(dir, "seal"))
	if err != nil {
		return "", err
	}
	chainID, now := fmt.Sprintf("sha256:%064x", id), time.Now().UTC()
	name = fmt.Sprintf("k8s.io/%d/%s", id, chainID)
	l.rows = append(l.rows, storage.Row{
		ID: id,
		Info: snapshots.Info{
			Kind: snapshots.KindCommitted, Name: name, Parent: parent, Created: now, Updated: now,
			// What containerd 2.4 gives to each layer.
			Labels: map[string]string{"containerd.io/snapshot.ref": chainID, "containerd.io/snapshot/diff-id": chainID},
		},
		Usage: snapshots.Usage{Inodes: sealed.Inodes, Size: sealed.Blocks},
		Commit: storage.CommitEntry{
			ID: id, Name: name, Namespace: "k8s.io", ChainID: chainID, Parent: parent, DiffID: chainID, Epoch: 1,
			Entries: sealed.Entries, Bytes: sealed.Bytes, Digest: sealed.Digest, Time: now, Strategy: storage.StrategySyncfs,
		},
	})
	l.Entries += sealed.Entries
	return name, nil
}

// Write writes the database, and makes another root with the same rows, and empty trees, for
// containerd's own snapshotter.
func (l *Layers) Write(ctx context.Context, stock string) error {
	for _, row := range l.rows {
		if err := os.MkdirAll(filepath.Join(stock, "snapshots", strconv.FormatUint(row.ID, 10), "fs"), 0o755); err != nil {
			return err
		}
	}
	if _, err := storage.Rebuild(ctx, l.root, "bench", l.rows); err != nil {
		return err
	}
	data, err := os.ReadFile(filepath.Join(l.root, storage.FileName))
	return errors.Join(err, os.WriteFile(filepath.Join(stock, storage.FileName), data, 0o600))
}

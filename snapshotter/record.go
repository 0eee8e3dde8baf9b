package snapshotter

import (
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Names of files beside fs/: the record of a snapshot, and of a committed one
// the seal and the content digests.
const (
	recordFile   = "record"
	sealFile     = "seal"
	contentsFile = "contents"
)

// record is what a snapshot directory says of itself, so that a lost
// metadata.db can be rebuilt. The database is the truth while there is one: a
// record that says committed may belong to a Commit that a crash cut short.
type record struct {
	ID      uint64            `json:"id"`
	Kind    string            `json:"kind"` // active, view or committed
	Name    string            `json:"name"` // key of an active snapshot or a view
	Parent  string            `json:"parent,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
	Created time.Time         `json:"created"`
	Updated time.Time         `json:"updated"`

	// Of a committed snapshot, as its walk found them.
	Inodes  int64  `json:"inodes,omitempty"`
	Size    int64  `json:"size,omitempty"`
	Entries int64  `json:"entries,omitempty"`
	Bytes   int64  `json:"bytes,omitempty"`
	Digest  string `json:"digest,omitempty"`

	Overlay *overlayMarks `json:"overlay,omitempty"`
}

// recordOf is the record of a row.
func recordOf(id uint64, info snapshots.Info) record {
	return record{
		ID: id, Kind: kindNames[info.Kind], Name: info.Name, Parent: info.Parent,
		Labels: info.Labels, Created: info.Created, Updated: info.Updated,
	}
}

// committedRecord is the record of a committed snapshot.
func committedRecord(id uint64, info snapshots.Info, c seal.Summary, t *truth) record {
	r := recordOf(id, info)
	r.Inodes, r.Size, r.Entries, r.Bytes, r.Digest = c.Inodes, c.Blocks, c.Entries, c.Bytes, c.Digest
	r.Overlay = &t.found
	return r
}

var kindNames = map[snapshots.Kind]string{
	snapshots.KindActive:    "active",
	snapshots.KindView:      "view",
	snapshots.KindCommitted: "committed",
}

func kindOf(name string) snapshots.Kind {
	for kind, n := range kindNames {
		if n == name {
			return kind
		}
	}
	return snapshots.KindUnknown
}

// writeRecord writes the first record of a new snapshot directory and syncs it.
func writeRecord(dir string, r record) error {
	data, err := storage.Encode(r)
	if err != nil {
		return err
	}
	return fsync.WriteFile(filepath.Join(dir, recordFile), data, 0o600)
}

// replaceRecord replaces a record under a temporary name, so that a crash
// leaves the old or the new one. Neither the content nor the name is synced
// when synced is false: a syncfs must follow.
func replaceRecord(dir string, r record, synced bool) error {
	data, err := storage.Encode(r)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, recordFile)
	next := path + ".new"
	if !synced {
		if err := os.WriteFile(next, data, 0o600); err != nil {
			return err
		}
		return os.Rename(next, path)
	}
	if err := fsync.WriteFile(next, data, 0o600); err != nil {
		return err
	}
	return fsync.Rename(next, path)
}

// readRecord reads a snapshot directory's record.
func readRecord(dir string) (r record, err error) {
	data, err := os.ReadFile(filepath.Join(dir, recordFile))
	if err != nil {
		return r, err
	}
	if err := storage.Decode(data, &r); err != nil {
		return r, &os.PathError{Op: "decode", Path: filepath.Join(dir, recordFile), Err: err}
	}
	return r, nil
}

// sameRow reports whether a record on disk says what the row says, leaving
// times and labels aside.
func (r record) sameRow(o record) bool {
	return r.ID == o.ID && r.Kind == o.Kind && r.Name == o.Name && r.Parent == o.Parent
}

func isNotExist(err error) bool { return errors.Is(err, os.ErrNotExist) }

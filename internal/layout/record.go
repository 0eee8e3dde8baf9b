package layout

import (
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
)

// Names of files beside fs/ in the directory of a snapshot.
const (
	RecordFile   = "record"
	SealFile     = "seal"     // of a committed snapshot
	ContentsFile = "contents" // its content digests, once they were taken
)

// Record describes the snapshot in whose directory it lies, so that a lost
// metadata.db can be rebuilt. The database is authoritative while there is one: a
// record with kind committed may belong to a Commit that a crash cut short.
type Record struct {
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
	// Contents is the digest of the content digests, once they were taken.
	Contents string `json:"contents,omitempty"`

	Overlay *OverlayMarks `json:"overlay,omitempty"`
}

// OverlayMarks counts the marks of a layer that overlayfs reads, and what the walk
// of its Commit, or of its heal, has changed; part of the layer's record.
type OverlayMarks struct {
	Space     string `json:"space"`               // prefix of the marks
	Opaque    int64  `json:"opaque,omitempty"`    // opaque directories
	Whiteouts int64  `json:"whiteouts,omitempty"` // entries that hide a name

	Root      bool  `json:"root,omitempty"`      // the tar made its root opaque; whiteouts express it
	Moved     int64 `json:"moved,omitempty"`     // opaque marks moved from the other space
	Removed   int64 `json:"removed,omitempty"`   // marks without a meaning, or set by the tar
	Inherited int64 `json:"inherited,omitempty"` // directories that got the attributes of the parent's
}

// RecordOf returns the record of a row.
func RecordOf(id uint64, info snapshots.Info) Record {
	return Record{
		ID: id, Kind: KindName(info.Kind), Name: info.Name, Parent: info.Parent,
		Labels: info.Labels, Created: info.Created, Updated: info.Updated,
	}
}

var kindNames = map[snapshots.Kind]string{
	snapshots.KindActive:    "active",
	snapshots.KindView:      "view",
	snapshots.KindCommitted: "committed",
}

// KindName returns the name of a kind in a record, "" for no kind.
func KindName(kind snapshots.Kind) string { return kindNames[kind] }

// KindOf returns the kind of a name, or snapshots.KindUnknown.
func KindOf(name string) snapshots.Kind {
	for kind, n := range kindNames {
		if n == name {
			return kind
		}
	}
	return snapshots.KindUnknown
}

// recordRoom is the size of the first record of a snapshot, in bytes. That of its Commit fits into it, unless
// there are many labels, so that OverwriteRecord needs no more room. A file takes a block of the disk anyway.
const recordRoom = 4096

// WriteRecord writes the first record of a new snapshot directory and syncs the
// file. The caller syncs the directory.
func WriteRecord(dir string, r Record) error {
	data, err := encode(r, recordRoom)
	if err != nil {
		return err
	}
	return fsync.WriteFile(filepath.Join(dir, RecordFile), data, 0o600)
}

// ReplaceRecord replaces a record under a temporary name, so that a crash leaves the
// old or the new one. Neither the content nor the name is synced: a syncfs must follow.
func ReplaceRecord(dir string, r Record) error {
	data, err := Encode(r)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, RecordFile)
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// ReplaceRecordSync is ReplaceRecord, and syncs content and name.
func ReplaceRecordSync(dir string, r Record) error {
	data, err := Encode(r)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, RecordFile)
	if err := fsync.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return fsync.Rename(path+".new", path)
}

// ReplaceRecordOnce is ReplaceRecordSync with one sync instead of two, where the file system has one
// journal; see [fsync.Replace]. A crash may leave a short record.
func ReplaceRecordOnce(dir string, r Record) error {
	data, err := Encode(r)
	if err != nil {
		return err
	}
	return fsync.Replace(filepath.Join(dir, RecordFile), data, 0o600)
}

// OverwriteRecord replaces a record that was synced in its place, and syncs it; see [fsync.Overwrite]. What has room
// in the record that is there takes no commit of the journal of a file system. A crash may leave neither the old one nor
// the new one, but a damaged one: for a snapshot that is still active, of which the next start writes it again.
func OverwriteRecord(dir string, r Record, flushed bool) error {
	path := filepath.Join(dir, RecordFile)
	st, err := os.Lstat(path)
	if err != nil {
		return err
	}
	data, err := encode(r, int(min(st.Size(), maxPayload)))
	if err != nil {
		return err
	}
	return fsync.Overwrite(path, data, flushed)
}

// ReadRecord reads a snapshot directory's record. The error wraps ErrCorrupt or
// ErrNewer when there is one that cannot be used; see Decode.
func ReadRecord(dir string) (r Record, err error) {
	data, err := os.ReadFile(filepath.Join(dir, RecordFile))
	if err != nil {
		return r, err
	}
	if err := Decode(data, &r); err != nil {
		return r, &os.PathError{Op: "decode", Path: filepath.Join(dir, RecordFile), Err: err}
	}
	return r, nil
}

// SameRow reports whether two records describe the same row, apart from times and
// labels.
func (r Record) SameRow(o Record) bool {
	return r.ID == o.ID && r.Kind == o.Kind && r.Name == o.Name && r.Parent == o.Parent
}

package unpack

import (
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
)

// CommittedRecord is the record of a committed snapshot.
func CommittedRecord(id uint64, info snapshots.Info, c seal.Summary, found layout.OverlayMarks) layout.Record {
	r := layout.RecordOf(id, info)
	r.Inodes, r.Size, r.Entries, r.Bytes, r.Digest = c.Inodes, c.Blocks, c.Entries, c.Bytes, c.Digest
	r.Overlay = &found
	return r
}

package snapshotter

import (
	"context"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Report is everything that metadata.db says, for people and programs.
type Report struct {
	Root      string           `json:"root"`
	Snapshots []SnapshotReport `json:"snapshots"`
	Journal   JournalReport    `json:"journal"`
}

// SnapshotReport is one row.
type SnapshotReport struct {
	ID      uint64            `json:"id"`
	Kind    string            `json:"kind"`
	Name    string            `json:"name"`
	Parent  string            `json:"parent,omitempty"`
	Created time.Time         `json:"created"`
	Updated time.Time         `json:"updated"`
	Size    int64             `json:"size"`   // bytes on disk; 0 unless committed
	Inodes  int64             `json:"inodes"` // 0 unless committed
	Labels  map[string]string `json:"labels,omitempty"`
}

// JournalReport is the commit journal.
type JournalReport struct {
	Open      []storage.OpenEntry   `json:"open"`
	Committed []storage.CommitEntry `json:"committed"`
	History   []storage.CommitEntry `json:"history"`
}

// Inspect reports on a live snapshotter.
func (s *Snapshotter) Inspect(ctx context.Context) (Report, error) {
	return report(s.cfg.Root, func(fn func(context.Context, *storage.Journal) error) error { return s.db.View(ctx, fn) })
}

// InspectRoot reports on a root whose daemon is not running. It writes nothing.
func InspectRoot(ctx context.Context, root string) (Report, error) {
	return report(root, func(fn func(context.Context, *storage.Journal) error) error {
		return storage.ReadOnly(ctx, root, fn)
	})
}

func report(root string, view func(func(context.Context, *storage.Journal) error) error) (Report, error) {
	r := Report{
		Root: root, Snapshots: []SnapshotReport{},
		Journal: JournalReport{Open: []storage.OpenEntry{}, Committed: []storage.CommitEntry{}, History: []storage.CommitEntry{}},
	}
	err := view(func(ctx context.Context, j *storage.Journal) error {
		if err := storage.Walk(ctx, func(id uint64, info snapshots.Info, usage snapshots.Usage) error {
			r.Snapshots = append(r.Snapshots, SnapshotReport{
				ID: id, Kind: kindNames[info.Kind], Name: info.Name, Parent: info.Parent,
				Created: info.Created, Updated: info.Updated, Size: usage.Size, Inodes: usage.Inodes, Labels: info.Labels,
			})
			return nil
		}); err != nil {
			return err
		}
		if err := j.EachOpen(appendTo(&r.Journal.Open)); err != nil {
			return err
		}
		if err := j.EachCommitted(appendTo(&r.Journal.Committed)); err != nil {
			return err
		}
		return j.EachRemoved(appendTo(&r.Journal.History))
	})
	return r, err
}

func appendTo[E any](list *[]E) func(E) error {
	return func(e E) error {
		*list = append(*list, e)
		return nil
	}
}

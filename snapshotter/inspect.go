package snapshotter

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Report is everything that metadata.db says, for people and programs.
type Report struct {
	Root      string           `json:"root"`
	Snapshots []SnapshotReport `json:"snapshots"`
	Journal   JournalReport    `json:"journal"`
	Layers    []CheckResult    `json:"layers"` // what is known of committed snapshots, without a look
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
	Run       storage.Run           `json:"run"`
	Scrub     storage.Scrub         `json:"scrub"`
}

// Inspect reports on a live snapshotter.
func (s *Snapshotter) Inspect(ctx context.Context) (Report, error) {
	r, err := report(s.cfg.Root, s.bootID, func(fn func(context.Context, *storage.Journal) error) error { return s.db.View(ctx, fn) })
	s.ready.mu.Lock()
	defer s.ready.mu.Unlock()
	// This process knows more than the journal.
	for i, e := range r.Journal.Committed {
		if l := s.ready.layers[e.Name]; l != nil && l.entry.Sequence == e.Sequence {
			r.Layers[i] = resultOf(l.entry, l.state)
		}
	}
	return r, err
}

// InspectRoot reports on a root whose daemon is not running. It writes nothing.
func InspectRoot(ctx context.Context, root string) (Report, error) {
	boot, err := bootID()
	if err != nil {
		return Report{}, err
	}
	return report(root, boot, func(fn func(context.Context, *storage.Journal) error) error {
		return storage.ReadOnly(ctx, root, fn)
	})
}

func report(root, bootID string, view func(func(context.Context, *storage.Journal) error) error) (Report, error) {
	r := Report{
		Root: root, Snapshots: []SnapshotReport{}, Layers: []CheckResult{},
		Journal: JournalReport{Open: []storage.OpenEntry{}, Committed: []storage.CommitEntry{}, History: []storage.CommitEntry{}},
	}
	err := view(func(ctx context.Context, j *storage.Journal) (err error) {
		if err := storage.Walk(ctx, func(id uint64, info snapshots.Info, usage snapshots.Usage) error {
			r.Snapshots = append(r.Snapshots, SnapshotReport{
				ID: id, Kind: kindNames[info.Kind], Name: info.Name, Parent: info.Parent,
				Created: info.Created, Updated: info.Updated, Size: usage.Size, Inodes: usage.Inodes, Labels: info.Labels,
			})
			return nil
		}); err != nil {
			return err
		}
		if r.Journal.Run, err = j.Run(); err != nil {
			return err
		}
		if r.Journal.Scrub, err = j.Scrub(); err != nil {
			return err
		}
		states := map[uint64]storage.StateEntry{}
		if err := j.EachState(func(e storage.StateEntry) error { states[e.ID] = e; return nil }); err != nil {
			return err
		}
		known := readiness{epoch: epochOf(r.Journal.Run, bootID)}
		if err := j.EachCommitted(func(e storage.CommitEntry) error {
			e = identified(e)
			r.Journal.Committed = append(r.Journal.Committed, e)
			r.Layers = append(r.Layers, resultOf(e, known.judge(e, states[e.ID])))
			return nil
		}); err != nil {
			return err
		}
		return errors.Join(j.EachOpen(appendTo(&r.Journal.Open)), j.EachRemoved(appendTo(&r.Journal.History)))
	})
	return r, err
}

// resultOf is what is known of a layer, in the form of a look.
func resultOf(e storage.CommitEntry, s storage.StateEntry) CheckResult {
	r := newResult(e)
	r.State, r.Reason, r.Checked, r.Deep, r.Contents = s.State, s.Reason, s.Checked, s.Deep, s.Contents
	r.Findings = append(r.Findings, s.Findings...)
	return r
}

func appendTo[E any](list *[]E) func(E) error {
	return func(e E) error {
		*list = append(*list, e)
		return nil
	}
}

package snapshotter

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/recorded"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Report is everything that metadata.db has, for operators and programs.
type Report struct {
	Root      string           `json:"root"`
	Snapshots []SnapshotReport `json:"snapshots"`
	Journal   JournalReport    `json:"journal"`
	Layers    []verify.Result  `json:"layers"` // what is known of committed snapshots, without a verification
	// Brake is why damaged layers are not mended until an operator decides, ""
	// when they are; see package internal/brake for the thresholds.
	Brake string `json:"brake,omitempty"`
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
	r, err := report(s.cfg.Root, s.bootID, func(fn func(context.Context, *storage.Journal) error) error { return s.gate.View(ctx, fn) })
	// This process knows more than the journal.
	r.Brake = s.layers.Brake()
	s.layers.Update(r.Layers, r.Journal.Committed)
	return r, err
}

// InspectRoot reports on a root whose daemon is not running. It writes nothing.
func InspectRoot(ctx context.Context, root string) (Report, error) {
	boot, err := layout.BootID()
	if err != nil {
		return Report{}, err
	}
	return report(root, boot, func(fn func(context.Context, *storage.Journal) error) error {
		return storage.ReadOnly(ctx, root, fn)
	})
}

func report(root, bootID string, view func(func(context.Context, *storage.Journal) error) error) (Report, error) {
	r := Report{
		Root: root, Snapshots: []SnapshotReport{}, Layers: []verify.Result{},
		Journal: JournalReport{Open: []storage.OpenEntry{}, Committed: []storage.CommitEntry{}, History: []storage.CommitEntry{}},
	}
	err := view(func(ctx context.Context, j *storage.Journal) (err error) {
		if err := storage.Walk(ctx, func(id uint64, info snapshots.Info, usage snapshots.Usage) error {
			r.Snapshots = append(r.Snapshots, SnapshotReport{
				ID: id, Kind: layout.KindName(info.Kind), Name: info.Name, Parent: info.Parent,
				Created: info.Created, Updated: info.Updated, Size: usage.Size, Inodes: usage.Inodes, Labels: info.Labels,
			})
			return nil
		}); err != nil {
			return err
		}
		if r.Journal.Scrub, err = j.Scrub(); err != nil {
			return err
		}
		known, err := recorded.Read(j, bootID)
		if err != nil {
			return err
		}
		r.Journal.Run, r.Brake = known.Run, known.Run.Brake
		r.Journal.Committed = append(r.Journal.Committed, known.Entries...)
		r.Layers = append(r.Layers, known.Results...)
		return errors.Join(j.EachOpen(appendTo(&r.Journal.Open)), j.EachRemoved(appendTo(&r.Journal.History)))
	})
	return r, err
}

func appendTo[E any](list *[]E) func(E) error {
	return func(e E) error {
		*list = append(*list, e)
		return nil
	}
}

// Layer is a committed snapshot of a report.
type Layer struct {
	storage.CommitEntry
	Known verify.Result // what the daemon, or the journal, has on record
}

// Verify is verify.Layer for the layer of a report, in the light of what is known of it.
// What keeps it from being verified is the result's Reason; the error is that of
// ctx.
func (l Layer) Verify(ctx context.Context, root string, o verify.Options) (verify.Result, error) {
	o.Contents = l.Known.Contents
	c, err := verify.Layer(ctx, root, l.CommitEntry, o)
	if ctx.Err() != nil {
		return c, ctx.Err()
	}
	if err != nil {
		c.State, c.Reason, c.Depth = storage.StateUnverified, err.Error(), ""
	}
	l.Known.Ref = l.Ref() // not part of a report
	return c.With(l.Known), nil
}

// Selected returns the committed snapshots with one of the ids, all without
// ids, in the order of their commits, which is that of parents before children.
func (r *Report) Selected(ids []uint64) (layers []Layer) {
	known := map[uint64]verify.Result{} // a daemon of an older version does not report layers
	for _, l := range r.Layers {
		known[l.ID] = l
	}
	for _, e := range r.Journal.Committed {
		if len(ids) == 0 || slices.Contains(ids, e.ID) {
			layers = append(layers, Layer{e, known[e.ID]})
		}
	}
	slices.SortFunc(layers, func(a, b Layer) int { return cmp.Compare(a.Sequence, b.Sequence) })
	return layers
}

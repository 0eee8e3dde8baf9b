package snapshotter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// RepairOptions say what Repair does.
type RepairOptions struct {
	IDs   []uint64 `json:"ids,omitempty"` // directory numbers of committed snapshots; nil: all
	Apply bool     `json:"apply"`         // heal, not only plan
	Deep  bool     `json:"deep"`          // look at content, too
}

// RepairResult is what Repair found of one layer that is not ready, and what it
// is going to do, or has done.
type RepairResult struct {
	CheckResult
	Blob   string `json:"blob,omitempty"` // digest of what it can be extracted from
	Plan   string `json:"plan"`
	Healed bool   `json:"healed"`
}

// Repair looks at layers and heals those that are damaged, the parents first. A
// layer that was never sealed is extracted again when it is named: then it has a
// seal. The results are those of layers that were not ready.
func (s *Snapshotter) Repair(ctx context.Context, o RepairOptions) ([]RepairResult, error) {
	r, err := s.Inspect(ctx)
	if err != nil {
		return nil, err
	}
	defer s.saySoon(ctx)
	results := []RepairResult{}
	for _, e := range r.Selected(o.IDs) {
		look, err := Check(ctx, s.cfg.Root, e.CommitEntry, CheckOptions{Deep: o.Deep, Blobs: s.blobs, Contents: e.Contents, Reading: FromDisk})
		if err != nil {
			return results, err
		}
		l := s.ready.layer(e.CommitEntry)
		if l == nil {
			continue // removed meanwhile
		}
		planned, again := plan(ctx, s.blobs, e.CommitEntry, look, o)
		if o.Apply {
			s.noteLook(ctx, l, e.CommitEntry, look, again)
		}
		if look.State == storage.StateReady {
			continue
		}
		if o.Apply && again {
			err := s.whole(ctx, e.Name, true)
			planned.Healed = err == nil
			if err != nil {
				planned.Plan, planned.Reason = "not healed", reasonOf(err)
			} else {
				planned.Plan, planned.State = "healed", storage.StateReady
			}
		}
		results = append(results, planned)
	}
	return results, nil
}

// reasonOf leaves out of an error what the finding says already.
func reasonOf(err error) string {
	if damaged := (*DamagedError)(nil); errors.As(err, &damaged) && damaged.Reason != "" {
		return damaged.Reason
	}
	return err.Error()
}

// noteLook takes the result of a look at the layer of a journal entry as what is
// known of it, unless it is being worked on, or something newer is known.
func (s *Snapshotter) noteLook(ctx context.Context, l *layer, e storage.CommitEntry, look CheckResult, again bool) {
	r := &s.ready
	r.mu.Lock()
	defer r.mu.Unlock()
	stale := l.work != nil || l.entry.Digest != e.Digest || l.state.Checked.After(look.Checked)
	if stale || look.State == storage.StateUnverified && !again {
		return
	}
	if again {
		look.State = storage.StateDamaged
	}
	s.setState(ctx, l, look)
	l.tried = time.Time{}
}

// layer returns what is known of the snapshot of a journal entry, nil when it
// was removed.
func (r *readiness) layer(e storage.CommitEntry) *layer {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l := r.layers[e.Name]; l != nil && l.entry.Sequence == e.Sequence {
		return l
	}
	return nil
}

// RepairRoot is Repair for a root whose daemon is not running. It takes the
// place of the daemon when it applies; a plan writes nothing.
func RepairRoot(ctx context.Context, cfg Config, o RepairOptions) (results []RepairResult, err error) {
	if o.Apply {
		cfg.NoBackground = true
		s, err := New(ctx, cfg)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, s.Close()) }()
		return s.Repair(ctx, o)
	}
	r, err := InspectRoot(ctx, cfg.Root)
	if err != nil {
		return nil, err
	}
	store := blobs.Open(cfg.ContentRoot)
	results = []RepairResult{}
	for _, e := range r.Selected(o.IDs) {
		look, err := Check(ctx, cfg.Root, e.CommitEntry, CheckOptions{Deep: o.Deep, Blobs: store, Contents: e.Contents, Reading: FromDisk})
		if err != nil {
			return results, err
		}
		if planned, _ := plan(ctx, store, e.CommitEntry, look, o); look.State != storage.StateReady {
			results = append(results, planned)
		}
	}
	return results, nil
}

// plan says what can be done for a layer, and whether it is to be extracted
// again.
func plan(ctx context.Context, store *blobs.Store, e storage.CommitEntry, look CheckResult, o RepairOptions) (r RepairResult, again bool) {
	r.CheckResult = look
	switch {
	case look.State == storage.StateReady:
		return r, false
	case look.State == storage.StateUnverified && !slices.Contains(o.IDs, e.ID):
		r.Plan = "none; name it to extract it again, which seals it"
		return r, false
	}
	found, err := blobsOf(ctx, store, e)
	if err != nil {
		r.Plan = fmt.Sprintf("cannot be healed: %v", err)
		return r, look.State == storage.StateDamaged
	}
	r.Blob = found[0].Digest.String()
	r.Plan = "extract again from " + r.Blob
	return r, true
}

// Layer is a committed snapshot of a report.
type Layer struct {
	storage.CommitEntry
	Contents string // digest of its content digests
}

// Selected returns the committed snapshots with one of the ids, all without
// ids, in the order of their commits, which is that of parents before children.
func (r *Report) Selected(ids []uint64) (layers []Layer) {
	contents := map[uint64]string{} // a daemon of an older version does not report layers
	for _, l := range r.Layers {
		contents[l.ID] = l.Contents
	}
	for _, e := range r.Journal.Committed {
		if len(ids) == 0 || slices.Contains(ids, e.ID) {
			layers = append(layers, Layer{e, contents[e.ID]})
		}
	}
	slices.SortFunc(layers, func(a, b Layer) int { return cmp.Compare(a.Sequence, b.Sequence) })
	return layers
}

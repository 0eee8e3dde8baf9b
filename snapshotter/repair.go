package snapshotter

import (
	"context"
	"errors"
	"slices"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// RepairRoot is Repair for a root whose daemon is not running. It takes the
// place of the daemon when it applies; a plan writes nothing.
func RepairRoot(ctx context.Context, cfg Config, o layers.RepairOptions) (results []layers.RepairResult, err error) {
	if o.Apply {
		cfg.NoBackground = true
		s, err := New(ctx, cfg)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, s.Close()) }()
		return s.layers.Repair(ctx, o)
	}
	r, err := InspectRoot(ctx, cfg.Root)
	if err != nil {
		return nil, err
	}
	from := cfg.Sources()
	results = []layers.RepairResult{}
	for _, e := range r.Selected(o.IDs) {
		found, err := e.Verify(ctx, cfg.Root, verify.Options{Deep: o.Deep, Blobs: from, Reading: verify.FromDisk})
		if err != nil {
			return results, err
		}
		if found.State != storage.StateReady {
			plan, _ := found.Plan(ctx, from, e.CommitEntry, slices.Contains(o.IDs, e.ID))
			results = append(results, layers.RepairResult{Result: found, Plan: plan})
		}
	}
	return results, nil
}

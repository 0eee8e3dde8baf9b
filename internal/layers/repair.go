package layers

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"github.com/durable-snapshotter/durable-snapshotter/internal/idle"
	"github.com/durable-snapshotter/durable-snapshotter/internal/scrub"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// RepairOptions control Repair.
type RepairOptions struct {
	IDs   []uint64 `json:"ids,omitempty"` // directory numbers of committed snapshots; nil: all
	Apply bool     `json:"apply"`         // heal, not only plan
	Deep  bool     `json:"deep"`          // verify content, too
}

// RepairResult is what Repair found of one layer that is not ready, and what it
// is going to do, or has done.
type RepairResult struct {
	verify.Result
	Plan   string `json:"plan"`
	Healed bool   `json:"healed"`
}

// Repair verifies layers and heals those that are damaged, the parents first. A
// layer that was never sealed is extracted again when it is named: then it has a
// seal. The results are those of layers that were not ready. With Apply it is an
// operator's decision to mend, also when too much was damaged at once. A layer that
// cannot be verified is reported, and the others are still repaired.
func (s *Layers) Repair(ctx context.Context, o RepairOptions) ([]RepairResult, error) {
	entries, err := s.committed(ctx, o.IDs)
	if err != nil {
		return nil, err
	}
	if o.Apply {
		s.table.mu.Lock()
		s.table.brake.Resume(ctx)
		s.table.mu.Unlock()
	}
	defer func() { _ = s.recorder.flush(ctx) }() // kept for the next time
	results := []RepairResult{}
	for _, e := range entries {
		l := s.table.layer(e)
		if l == nil {
			continue // removed meanwhile
		}
		result, err := s.repairLayer(ctx, l, o)
		if err != nil {
			return results, err
		}
		if s.table.layer(e) == l && (result.State != storage.StateReady || result.Plan != "") {
			results = append(results, result)
		}
	}
	return results, nil
}

// committed returns the journal entries of the committed snapshots with one of the
// ids, of all without ids, in the order of their commits, which is that of parents
// before children.
func (s *Layers) committed(ctx context.Context, ids []uint64) (entries []storage.CommitEntry, err error) {
	err = s.gate.View(ctx, func(_ context.Context, j *storage.Journal) error {
		return j.EachCommitted(func(e storage.CommitEntry) error {
			if len(ids) == 0 || slices.Contains(ids, e.ID) {
				entries = append(entries, e)
			}
			return nil
		})
	})
	slices.SortFunc(entries, func(a, b storage.CommitEntry) int { return cmp.Compare(a.Sequence, b.Sequence) })
	return entries, err
}

// repairLayer is Repair for one layer. Its error is that of ctx.
func (s *Layers) repairLayer(ctx context.Context, l *layer, o RepairOptions) (RepairResult, error) {
	found, err := s.verifyPresent(ctx, l, verify.Options{Deep: o.Deep, Reading: verify.FromDisk})
	if err != nil {
		return RepairResult{}, err
	}
	t := s.table
	t.mu.Lock()
	if o.Apply {
		s.table.note(ctx, l, found)
	}
	entry := l.entry
	found = found.With(verify.Known(entry, l.state))
	t.mu.Unlock()
	result := RepairResult{Result: found}
	plan, again := result.Result.Plan(ctx, s.blobs, entry, slices.Contains(o.IDs, entry.ID))
	result.Plan = plan
	if !o.Apply || !again {
		return result, nil
	}
	t.mu.Lock()
	l.named = found.State != storage.StateDamaged
	l.heals, l.broken = idle.Pause{}, nil
	t.set(l, func(s *storage.StateEntry) { s.Attempts = 0 })
	t.mu.Unlock()
	err = s.ensureReady(ctx, entry.Name, true)
	t.mu.Lock()
	state, tree := l.state, l.entry.Digest
	t.mu.Unlock()
	switch {
	case state.State == storage.StateReady && tree != entry.Digest:
		result.Healed, result.Plan, result.State = true, "healed", storage.StateReady
	case err != nil:
		result.Plan, result.Reason = "not healed", reasonOf(err)
	case state.State == storage.StateReady:
		result.Plan, result.State, result.Findings = "whole when it was verified again; nothing was replaced", storage.StateReady, nil
	default:
		result.Plan, result.Reason = "not healed", state.Reason
	}
	return result, nil
}

// verifyPresent verifies the tree that is there when it ends: one that is exchanged
// meanwhile seems to be damaged. What keeps it from being verified is the result's
// Reason; the error is that of ctx.
func (s *Layers) verifyPresent(ctx context.Context, l *layer, o verify.Options) (c verify.Result, err error) {
	for range 3 {
		c, err = s.verify(ctx, l, o)
		if _, now := s.table.current(l); now.Ref().Same(c.Ref) {
			break
		}
	}
	if ctx.Err() != nil {
		return c, ctx.Err()
	}
	if err != nil {
		c.State, c.Reason, c.Depth = storage.StateUnverified, err.Error(), ""
	}
	return c, nil
}

// reasonOf leaves out of an error what the finding has already.
func reasonOf(err error) string {
	if damaged := (*DamagedError)(nil); errors.As(err, &damaged) && damaged.Reason != "" {
		return damaged.Reason
	}
	return err.Error()
}

// Scrub verifies a layer, and heals it when it is damaged. present is false when it
// was removed meanwhile. The error is scrub.ErrRemoved, when it was gone before, or
// that of ctx.
func (s *Layers) Scrub(ctx context.Context, e storage.CommitEntry, o verify.Options) (found verify.Result, present bool, err error) {
	l := s.table.layer(e)
	if l == nil {
		return found, false, scrub.ErrRemoved
	}
	if err := idle.Contain(func() (err error) {
		found, err = s.verifyPresent(ctx, l, o)
		return err
	}); err != nil && ctx.Err() != nil {
		return found, false, ctx.Err()
	} else if err != nil {
		found.State, found.Reason = storage.StateUnverified, firstLine(err.Error())
	}
	s.table.mu.Lock()
	s.table.note(ctx, l, found)
	state := l.state.State
	s.table.mu.Unlock()
	if s.table.layer(e) == nil {
		return found, false, nil
	}
	if state == storage.StateDamaged {
		_ = s.ensureReady(ctx, e.Name, true) // heals, and logs itself when it cannot
	}
	return found, true, nil
}

package imagecheck

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/images"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// RowsOf takes from a report what package images needs of it, and the committed layers by their
// numbers.
func RowsOf(report snapshotter.Report) ([]images.Row, map[uint64]snapshotter.Layer) {
	byID := map[uint64]snapshotter.Layer{}
	for _, l := range report.Selected(nil) {
		byID[l.ID] = l
	}
	abandoned := map[uint64]bool{}
	for _, e := range report.Journal.Open {
		abandoned[e.ID] = !e.Abandoned.IsZero() || e.Poisoned != ""
	}
	rows := make([]images.Row, len(report.Snapshots))
	for i, s := range report.Snapshots {
		l, committed := byID[s.ID]
		rows[i] = images.Row{ID: s.ID, Name: s.Name, Parent: s.Parent, Created: s.Created, Abandoned: abandoned[s.ID]}
		if rows[i].Committed = s.Kind == "committed"; committed {
			rows[i].Sealed = l.Time.Format(time.RFC3339Nano)
		}
	}
	return rows, byID
}

// rows are those of a running snapshotter.
type rows struct {
	sn *snapshotter.Snapshotter
	// wait: a layer is verified first, and healed if possible. Else what is known counts.
	wait   bool
	layers map[uint64]snapshotter.Layer // of the latest list
}

func (r *rows) list(ctx context.Context) (all []images.Row, err error) {
	report, err := r.sn.Inspect(ctx)
	if err != nil {
		return nil, err
	}
	all, r.layers = RowsOf(report)
	return all, nil
}

// verify returns what is known of a layer. The error is that of ctx.
func (r *rows) verify(ctx context.Context, row images.Row) (found verify.Result, removed bool, err error) {
	l, ok := r.layers[row.ID]
	if !ok || l.Name != row.Name {
		return found, true, nil
	}
	if r.wait {
		err := r.sn.Layers().Wait(ctx, row.Name, true)
		if ctx.Err() != nil {
			return found, false, ctx.Err()
		}
		if errdefs.IsNotFound(err) {
			return found, true, nil
		}
	}
	results := []verify.Result{l.Known}
	r.sn.Layers().Update(results, []storage.CommitEntry{l.CommitEntry})
	return results[0], false, ctx.Err()
}

// heal heals damaged layers as far as the brake allows it, and returns what has become of each.
func (r *rows) heal(ctx context.Context, ids []uint64, _ bool) (map[uint64]string, error) {
	done := map[uint64]string{}
	for _, id := range ids {
		l, ok := r.layers[id]
		if !ok {
			continue
		}
		_, key := layout.SplitName(l.Name)
		err := r.sn.Layers().HealNow(ctx, l.Namespace, key)
		if ctx.Err() != nil {
			return done, ctx.Err()
		}
		if done[id] = "healed"; err != nil {
			done[id] = "not healed: " + reasonOf(err)
		}
	}
	return done, nil
}

// reasonOf leaves out of an error what the verdict has already.
func reasonOf(err error) string {
	if damaged := (*layers.DamagedError)(nil); errors.As(err, &damaged) && damaged.Reason != "" {
		return damaged.Reason
	}
	return err.Error()
}

// confirm returns nil only when a layer is damaged still, and nothing can heal it.
func (r *rows) confirm(ctx context.Context, row images.Row, _ bool) error {
	l, ok := r.layers[row.ID]
	if !ok || l.Name != row.Name {
		return fmt.Errorf("nothing is removed: snapshot %s has gone meanwhile", row.Name)
	}
	_, key := layout.SplitName(row.Name)
	return r.sn.Layers().ConfirmDamaged(ctx, l.Namespace, key)
}

package oracle

import (
	"context"
	"fmt"
	"slices"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// retry extracts and commits what is not there, as the next pull would: a crash
// must not leave anything in its way.
func (k *examination) retry(ctx context.Context, extent Extent) {
	for _, chain := range k.Plan.Chains {
		for _, l := range chain.Layers {
			if _, there := k.Committed[l.Name]; there {
				continue // and if it is not whole, that was reported
			}
			if !extent.All && !slices.Contains(extent.Retry, l.Name) {
				continue
			}
			if l.Parent != "" && !k.Retried[l.Parent] {
				if p, there := k.Committed[l.Parent]; !there || p.Denied != nil || p.Diff != "" {
					continue
				}
			}
			if err := k.extract(ctx, l); err != nil {
				k.flaw("extract %q again: %v", l.Name, err)
				continue
			}
			k.Retried[l.Name] = true
		}
	}
}

func (k *examination) extract(ctx context.Context, l *workload.Layer) error {
	k.view++
	key := l.Key(fmt.Sprintf("again%s-%d", k.Tag, k.view))
	k.mark(workload.Begin, workload.Prepare, key, "")
	mounts, err := k.s.Prepare(ctx, key, l.Parent, l.Labels())
	if err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	k.mark(workload.Ack, workload.Prepare, key, "")
	if err := l.Extract(ctx, mounts, false); err != nil {
		return err
	}
	if !k.Generic {
		tree, err := workload.TreeOf(mounts)
		if err != nil {
			return err
		}
		if want, ok := k.Record.Trees[l.Name]; ok {
			if diff := kit.Diff(want, tree, 3); diff != "" {
				return fmt.Errorf("not what it was before the crash:\n%s", diff)
			}
		}
	}
	k.mark(workload.Begin, workload.Commit, l.Name, key)
	if err := k.s.Commit(ctx, l.Name, key, l.Labels()); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	k.mark(workload.Ack, workload.Commit, l.Name, key)
	if _, err := k.s.Stat(ctx, l.Name); err != nil {
		return fmt.Errorf("stat after commit: %w", err)
	}
	return nil
}

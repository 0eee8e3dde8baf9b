package snapshotter

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/active"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/marks"
	"github.com/durable-snapshotter/durable-snapshotter/internal/unpack"
)

// normalizerOf is for the layer of an active snapshot that is going to be committed
// on a parent, or on none. made is what Apply has made of it, nil if nothing.
func (s *Snapshotter) normalizerOf(ctx context.Context, a *active.Snapshot, info snapshots.Info, parent string, made *active.Layer) (*marks.Normalizer, error) {
	t := treeOf(a, info, parent)
	if t.Rebased && a.Extraction && !isRebase(info) {
		return nil, fmt.Errorf("parallel unpack by a client that does not announce the parent at Prepare: its applier lost the whiteouts; "+
			"use containerd 2.3 or newer, or take \"rebase\" out of the capabilities of the proxy plugin: %w", errdefs.ErrFailedPrecondition)
	}
	t.Path = s.root.Tree(a.ID)
	if made != nil {
		t.Dirs, t.Again = made.Dirs, made.Sealed
	}
	return s.layers.Normalizer(ctx, t)
}

// treeOf is the tree of an active snapshot that is going to be committed.
func treeOf(a *active.Snapshot, info snapshots.Info, parent string) unpack.Tree {
	chainID, _ := layout.ExtractionOf(info.Name, info.Labels)
	return unpack.Tree{Parent: parent, Extraction: a.Extraction, Rebased: info.Parent != parent, ChainID: chainID, Created: info.Created}
}

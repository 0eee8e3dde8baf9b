package snapshotter

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/marks"
	"github.com/durable-snapshotter/durable-snapshotter/internal/unpack"
)

// normalizerOf is for the layer of an active snapshot that is going to be committed
// on a parent, or on none.
func (s *Snapshotter) normalizerOf(ctx context.Context, a *active, info snapshots.Info, parent string) (*marks.Normalizer, error) {
	rebased := info.Parent != parent
	if rebased && a.extraction && !isRebase(info) {
		return nil, fmt.Errorf("parallel unpack by a client that does not announce the parent at Prepare: its applier lost the whiteouts; "+
			"use containerd 2.3 or newer, or take \"rebase\" out of the capabilities of the proxy plugin: %w", errdefs.ErrFailedPrecondition)
	}
	chainID, _ := layout.ExtractionOf(info.Name, info.Labels)
	return s.layers.Normalizer(ctx, unpack.Tree{
		Path: s.root.Tree(a.id), Parent: parent, Extraction: a.extraction, Rebased: rebased, ChainID: chainID, Created: info.Created,
	})
}

package unpack

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/marks"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Parent is a committed snapshot below another one.
type Parent struct {
	Entry storage.CommitEntry // without a digest, it was never sealed
	Tree  string
}

// parentsOf returns what marks must know of a chain.
func parentsOf(chain []Parent) []marks.Parent {
	parents := make([]marks.Parent, len(chain))
	for i, p := range chain {
		parents[i] = marks.Parent{ID: p.Entry.ID, Name: p.Entry.Name, Sequence: p.Entry.Sequence, Digest: p.Entry.Digest, Tree: p.Tree}
	}
	return parents
}

// Lower returns the chain that begins with a committed snapshot, topmost first.
// The chain of "" is empty.
func (u *Unpacker) Lower(ctx context.Context, name string) (lower []Parent, err error) {
	err = u.cfg.Gate.View(ctx, func(ctx context.Context, j *storage.Journal) error {
		for name := name; name != ""; {
			id, info, _, err := storage.Info(ctx, name)
			if err != nil {
				return fmt.Errorf("parent %q: %w", name, err)
			}
			if info.Kind != snapshots.KindCommitted {
				return fmt.Errorf("parent %q is not committed: %w", name, errdefs.ErrFailedPrecondition)
			}
			entry, err := j.GetCommitted(id)
			if errors.Is(err, storage.ErrNoEntry) {
				entry, err = storage.CommitEntry{ID: id, Name: name}, nil
			}
			if err != nil {
				return fmt.Errorf("parent %q: %w", name, err)
			}
			lower = append(lower, Parent{entry, u.cfg.Root.Tree(id)})
			name = info.Parent
		}
		return nil
	})
	return lower, err
}

// chain is the marks.Chain that begins with a committed snapshot.
type chain struct {
	u      *Unpacker
	parent string // committed name of the topmost
}

func (c chain) Parents(ctx context.Context) ([]marks.Parent, error) {
	lower, err := c.u.Lower(ctx, c.parent)
	return parentsOf(lower), err
}

func (c chain) Exchanged(ctx context.Context, p marks.Parent) bool {
	return c.u.Exchanged(ctx, storage.Ref{ID: p.ID, Sequence: p.Sequence, Digest: p.Digest})
}

func (c chain) Suspect(ctx context.Context, p marks.Parent, why error) error {
	return c.u.cfg.Suspect(ctx, storage.CommitEntry{ID: p.ID, Name: p.Name, Sequence: p.Sequence}, why)
}

// Exchanged reports whether a layer has another tree now: it was healed.
func (u *Unpacker) Exchanged(ctx context.Context, tree storage.Ref) (yes bool) {
	_ = u.cfg.Gate.View(ctx, func(_ context.Context, j *storage.Journal) error {
		now, err := j.GetCommitted(tree.ID)
		yes = err == nil && !now.Ref().Same(tree)
		return err
	})
	return yes
}

// Chain returns what marks must know of the chain that begins with a committed
// snapshot.
func (u *Unpacker) Chain(parent string) marks.Chain { return chain{u, parent} }

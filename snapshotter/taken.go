package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/metrics"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// containerd numbers a committed snapshot inside the transaction that also calls
// Commit (core/metadata/snapshot.go:635). When that transaction is rolled back after
// Commit has answered, because the caller was canceled, containerd was killed or its
// database was deleted, the number is given out again. The next Commit of the same
// layer asks for a name that is taken here and that containerd does not know.
//
// AlreadyExists would be wrong: containerd's unpacker takes it for success and drops
// its extraction, and the next layer fails with "parent snapshot does not exist". So
// the Commit of an extraction settles the name. The snapshot that has it stays when
// it is the same layer, and is replaced otherwise.

// nameTaken returns AlreadyExists when a snapshot has name and the Commit of key may
// not settle that: key is no extraction, or the snapshot is not committed. infoErr is
// the error of looking up key.
func nameTaken(ctx context.Context, name, key string, info snapshots.Info, infoErr error) error {
	_, there, _, err := storage.Info(ctx, name)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	_, extraction := layout.ExtractionOf(key, info.Labels)
	if infoErr == nil && info.Kind == snapshots.KindActive && extraction &&
		there.Kind == snapshots.KindCommitted {
		return nil
	}
	return fmt.Errorf("name is taken: %w", errdefs.ErrAlreadyExists)
}

// adopt ends the Commit of an extraction whose layer is here already: only the row of
// the active snapshot goes. done is false when the extraction must be committed.
func (c *commit) adopt(ctx context.Context) (done bool, err error) {
	if !c.layers.Has(ctx, c.committed) {
		return false, nil
	}
	err = c.gate.Update(ctx, nil, func(ctx context.Context, j *storage.Journal) error {
		if done = c.layers.Has(ctx, c.committed); !done {
			return nil
		}
		return c.dropActive(ctx, j)
	})
	if done && err == nil {
		c.adopted(ctx)
	}
	return done, err
}

// dropActive removes the rows of an extraction whose layer is here already.
func (c *commit) dropActive(ctx context.Context, j *storage.Journal) error {
	if err := c.active.Writer.Poisoned(); err != nil {
		return err
	}
	defer faults.Point(faults.CommitInTx)
	return errors.Join(storage.Remove(ctx, c.key), j.Remove(c.active.ID, time.Now().UTC()))
}

// adopted follows a transaction that has dropped an extraction: its tree goes.
func (c *commit) adopted(ctx context.Context) {
	log.G(ctx).WithFields(log.Fields{"key": c.key, "name": c.name}).
		Info("the layer of an extraction is here already, and ready: the extraction is dropped")
	metrics.Adopted.Inc()
	c.actives.Forget(c.key)
	c.cleanUpSoon()
}

// vacated is a snapshot whose rows vacate has removed.
type vacated struct {
	name string
	id   uint64
}

// vacate removes the rows of the committed snapshot name, if there is one, and of all
// that stand on it. containerd does not know name, or it would not ask for it, and so
// it knows nothing that stands on it: its next collection would remove the same rows.
func vacate(ctx context.Context, j *storage.Journal, name string) (gone []vacated, err error) {
	if _, there, _, err := storage.Info(ctx, name); errdefs.IsNotFound(err) {
		return nil, nil
	} else if err != nil {
		return nil, err
	} else if there.Kind != snapshots.KindCommitted {
		return nil, fmt.Errorf("name is taken: %w", errdefs.ErrAlreadyExists)
	}
	ids, on := map[string]uint64{}, map[string][]string{}
	if err := storage.Walk(ctx, func(id uint64, info snapshots.Info, _ snapshots.Usage) error {
		ids[info.Name] = id
		on[info.Parent] = append(on[info.Parent], info.Name)
		return nil
	}); err != nil {
		return nil, err
	}
	now := time.Now().UTC()
	var remove func(name string) error
	remove = func(name string) error {
		for _, child := range on[name] {
			if err := remove(child); err != nil {
				return err
			}
		}
		gone = append(gone, vacated{name, ids[name]})
		return errors.Join(storage.Remove(ctx, name), j.Remove(ids[name], now))
	}
	return gone, remove(name)
}

// replaced follows a transaction that has committed a layer under a name that others
// had.
func (c *commit) replaced(ctx context.Context, added *layers.Added, gone []vacated) {
	if len(gone) == 0 {
		return
	}
	log.G(ctx).WithFields(log.Fields{"name": c.name, "rows": len(gone)}).
		Warn("a committed snapshot that containerd does not know was replaced, with all that stood on it")
	added.Replaces()
	for _, g := range gone {
		c.actives.Forget(g.name)
		c.layers.Drop(g.name, g.id)
	}
	c.cleanUpSoon()
}

// cleanUpSoon deletes directories without a row in the background.
func (s *Snapshotter) cleanUpSoon() {
	s.running.Go(func() {
		if err := s.Cleanup(s.background); err != nil && s.background.Err() == nil {
			log.G(s.background).WithError(err).Warn("directories without a row were not deleted: the next Cleanup does it")
		}
	})
}

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/active"
	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/internal/gate"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/marks"
	"github.com/durable-snapshotter/durable-snapshotter/internal/metrics"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/internal/unpack"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Commit turns the active snapshot key into the committed snapshot name. When
// it returns nil, the layer and the record of it are on disk (I1).
//
// An extraction whose name is taken by the same layer, ready and on the same parent,
// is dropped, and Commit succeeds; what else has the name is replaced. See taken.go.
//
// Errors are those of containerd's snapshotters: AlreadyExists for a name that
// is taken when key is no extraction, NotFound for a key or a parent that does not exist,
// FailedPrecondition for a view. FailedPrecondition also means that the
// snapshot can never be committed: a write failed while it was active, or it is
// an extraction that an earlier daemon began. Its layer must be extracted
// again, under a new key.
//
// A Commit whose context ends either happened or did not; it is not undone
// after its transaction has begun.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) (err error) {
	if err := errors.Join(layout.CheckName("name", name), layout.CheckName("key", key)); err != nil {
		return err
	}
	if err := s.gate.Open(ctx); err != nil {
		return err
	}
	unlock, err := s.keys.Lock(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	began := time.Now()
	err = (&commit{Snapshotter: s, name: name, key: key, opts: opts}).run(ctx)
	metrics.Since(metrics.CommitSeconds, began)
	metrics.Commits.WithLabelValues(resultOf(err)).Inc()
	if err != nil {
		return fmt.Errorf("commit %q as %q: %w", key, name, err)
	}
	faults.Point(faults.CommitDone)
	if s.cfg.OnCommit != nil {
		s.cfg.OnCommit(layout.SplitName(name))
	}
	return nil
}

// resultOf is the result of a Commit in its metrics.
func resultOf(err error) string {
	switch {
	case err == nil:
		return metrics.OK
	case errdefs.IsAlreadyExists(err), errdefs.IsNotFound(err), errdefs.IsFailedPrecondition(err), errdefs.IsInvalidArgument(err):
		return metrics.Refused
	}
	return metrics.Failed
}

// commit is one Commit.
type commit struct {
	*Snapshotter
	name, key string
	opts      []snapshots.Opt

	active    *active.Snapshot
	info      snapshots.Info // of the active snapshot
	committed snapshots.Info // of the row that is going to be written
}

func (c *commit) run(ctx context.Context) (err error) {
	if err := c.find(ctx); err != nil {
		return err
	}
	if c.committed, err = committedInfo(c.name, c.info, c.opts); err != nil {
		return err
	}
	if c.active.Extraction && c.layers.Knows(c.name) {
		unlock, err := c.keys.Lock(ctx, c.name) // what has the name may be in the middle of a heal
		if err != nil {
			return err
		}
		defer unlock()
		if done, err := c.adopt(ctx); done || err != nil {
			return err
		}
	}
	c.active.Leave()
	made, beside, err := c.actives.Made(c.active)
	if err != nil {
		return err
	}
	if beside {
		if quick, err := c.sealedByApply(ctx, made); err != nil {
			return err
		} else if quick {
			return c.commitApplied(ctx, made)
		}
		if err := c.place(c.active); err != nil {
			return err
		}
	}
	return c.commitTree(ctx, made, beside)
}

// commitTree seals and syncs what is in fs/. made is what Apply has made of it, nil if
// nothing. placed: it was durable, and beside fs/ until now, so only what is done here is
// new.
func (c *commit) commitTree(ctx context.Context, made *active.Layer, placed bool) error {
	dir := c.root.Dir(c.active.ID)
	var files *fsync.Files // is nil when all must be synced
	if placed {
		files = c.gate.Files()
		defer files.Close()
	}
	n, err := c.normalizerOf(ctx, c.active, c.info, c.committed.Parent, made)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			c.giveUp(n, err)
		}
	}()
	if !placed {
		c.gate.CommitAhead(ctx, c.active.Writer)
	}
	began := time.Now()
	sum, err := seal.ChangeAndWrite(ctx, filepath.Join(dir, "fs"), filepath.Join(dir, layout.SealFile), n.Normalize, files, nil)
	if meaning := (*marks.Error)(nil); errors.As(err, &meaning) {
		c.active.Writer.Poison(err)
	}
	if err != nil {
		return err
	}
	metrics.Since(metrics.CommitPhaseSeconds.WithLabelValues(metrics.PhaseWalk), began)
	faults.Point(faults.CommitWalked)

	defer func() {
		// The record speaks too early if this Commit fails.
		if err != nil {
			c.restoreRecord(ctx)
		}
	}()
	record := unpack.CommittedRecord(c.active.ID, c.committed, sum, n.Found())
	if files.Complete() {
		err = c.record(ctx, sum, &rest{files: files, record: record})
		return err
	}
	if err = layout.ReplaceRecord(dir, record); err != nil {
		return err
	}
	faults.Point(faults.CommitRecorded)
	err = c.record(ctx, sum, nil)
	return err
}

// sealedByApply reports whether what Apply has made is the layer, for the parent that
// it is going to have.
func (c *commit) sealedByApply(ctx context.Context, made *active.Layer) (bool, error) {
	if !made.Sealed || c.committed.Parent == c.info.Parent {
		return made.Sealed, nil
	}
	if !isRebase(c.info) {
		return false, nil // refused by normalizerOf
	}
	return c.layers.RootBelow(ctx, c.committed.Parent)
}

// commitApplied commits what Apply has made.
func (c *commit) commitApplied(ctx context.Context, made *active.Layer) error {
	record := unpack.CommittedRecord(c.active.ID, c.committed, made.Sum, made.Found)
	record.Contents = made.Contents
	err := c.record(ctx, made.Sum, &rest{record: record})
	if err != nil {
		c.restoreRecord(ctx)
	}
	return err
}

// rest is what is new of a layer since Apply has made it durable.
type rest struct {
	files  *fsync.Files // that were written since; nil if nothing is new but the record, and the place of the tree
	record layout.Record
}

// syncRest makes the rest of a layer durable. That its tree has its place need not be: a start puts it there.
func (c *commit) syncRest(r *rest) (err error) {
	dir := c.root.Dir(c.active.ID)
	if r.files == nil {
		if err = c.place(c.active); err == nil {
			err = layout.OverwriteRecord(dir, r.record, c.gate.InPlace())
		}
	} else if err = r.files.Wait(); err == nil {
		err = layout.ReplaceRecordOnce(dir, r.record) // with the sync that Wait needs
	}
	if err == nil {
		faults.Point(faults.CommitPlaced)
	}
	return err
}

// restoreRecord makes the record of a snapshot whose Commit has failed an active one
// again. Recovery does it as well; this is for a process that lives on, and its next Commit may overwrite it.
func (c *commit) restoreRecord(ctx context.Context) {
	if err := c.gate.Do(ctx, func() error {
		return layout.ReplaceRecordSync(c.root.Dir(c.active.ID), layout.RecordOf(c.active.ID, c.info))
	}); err != nil {
		log.G(ctx).WithError(err).WithField("key", c.key).Warn("the record of a snapshot could not be set back to active")
	}
}

// record makes the layer durable, and then writes its row and its journal entry. rest is
// nil if everything must be synced.
func (c *commit) record(ctx context.Context, sum seal.Summary, rest *rest) (err error) {
	entry := c.commitEntry(c.active, c.committed, sum)
	if rest != nil {
		entry.Strategy = storage.StrategyApplied
	}
	var (
		here  bool
		added *layers.Added
		gone  []vacated
	)
	began := time.Now()
	inTx := func(ctx context.Context, j *storage.Journal) (err error) {
		metrics.Since(metrics.CommitPhaseSeconds.WithLabelValues(metrics.PhaseSync), began)
		began = time.Now()
		if here = c.active.Extraction && c.layers.Has(ctx, c.committed); here {
			return c.dropActive(ctx, j) // another Commit was quicker
		}
		if c.active.Extraction {
			if gone, err = vacate(ctx, j, c.name); err != nil {
				return err
			}
		}
		if err := storage.Commit(ctx, c.key, c.name, snapshots.Usage{Inodes: sum.Inodes, Size: sum.Blocks}, c.opts...); err != nil {
			return err
		}
		defer faults.Point(faults.CommitInTx)
		if err := errors.Join(j.Commit(&entry), c.layers.RecordRun(j)); err != nil {
			return err
		}
		// Known before its row can be seen, which is when it is asked for.
		added = c.layers.Add(entry)
		return nil
	}
	undo := gate.Undo{Key: c.name, ID: c.active.ID, Forget: func() {
		if added != nil {
			added.TakeBack()
		}
	}}
	if rest == nil {
		err = c.gate.Commit(ctx, c.active.Writer, &undo, inTx)
	} else {
		err = c.gate.CommitRest(ctx, c.active.Writer, &undo, func() error { return c.syncRest(rest) }, inTx)
	}
	if err != nil {
		return err
	}
	if rest != nil {
		metrics.QuickCommits.Inc()
	}
	metrics.Since(metrics.CommitPhaseSeconds.WithLabelValues(metrics.PhaseTransaction), began)
	metrics.CommitBytes.Add(float64(sum.Bytes))
	metrics.CommitInodes.Add(float64(sum.Inodes))
	if here {
		c.adopted(ctx)
		return nil
	}
	c.layers.RunRecorded()
	c.actives.Forget(c.key)
	c.replaced(ctx, added, gone)
	return nil
}

// find finds the active snapshot of the key and refuses what can never be committed,
// in the order of containerd's storage.CommitActive.
func (c *commit) find(ctx context.Context) error {
	if err := c.gate.View(ctx, func(ctx context.Context, _ *storage.Journal) (err error) {
		_, c.info, _, err = storage.Info(ctx, c.key)
		// A client that lost the answer commits again: that the name is there is the
		// better news than that the key is not.
		if taken := nameTaken(ctx, c.name, c.key, c.info, err); taken != nil {
			return taken
		}
		if err != nil {
			return err
		}
		if c.info.Kind != snapshots.KindActive {
			return fmt.Errorf("not an active snapshot: %w", errdefs.ErrFailedPrecondition)
		}
		return nil
	}); err != nil {
		return err
	}
	if c.active = c.actives.Get(c.key); c.active == nil {
		// Recovery knows every active row, and so does Prepare.
		return fmt.Errorf("active snapshot without a cursor: %w", errdefs.ErrInternal)
	}
	return c.active.Writer.Poisoned()
}

// giveUp refuses an extraction for ever when the Commit that changed its tree
// has failed, for whatever reason. The changes are not idempotent: opaque marks
// that were moved look smuggled to a second pass, and attributes of one parent
// look like those of an entry. Nothing is lost: containerd drops the key and
// extracts again. In memory is enough: a restart closes extractions.
//
// What was written through a mount stays committable, so that a container can be
// committed under another name: there a Normalizer only removes marks that mean nothing,
// and a second pass finds them gone.
func (c *commit) giveUp(n *marks.Normalizer, err error) {
	if n.Unrepeatable() {
		// Not wrapped: AlreadyExists would mean success to the client.
		c.active.Writer.Poison(fmt.Errorf("an earlier commit changed the extracted tree and then failed (%v)", err))
	}
}

// applied returns what the options of a call set of a snapshot.
func applied(opts []snapshots.Opt) (info snapshots.Info, err error) {
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return info, err
		}
	}
	return info, layout.CheckLabels(info.Labels)
}

// committedInfo is the row that storage.Commit will write, for the record that
// must be on disk before.
func committedInfo(name string, info snapshots.Info, opts []snapshots.Opt) (snapshots.Info, error) {
	base, err := applied(opts)
	if err != nil {
		return base, err
	}
	now := time.Now().UTC()
	c := snapshots.Info{Kind: snapshots.KindCommitted, Name: name, Parent: info.Parent, Labels: base.Labels, Created: now, Updated: now}
	if c.Parent == "" {
		c.Parent = base.Parent // parallel unpack names the parent only now
	}
	return c, nil
}

func (s *Snapshotter) commitEntry(a *active.Snapshot, info snapshots.Info, c seal.Summary) storage.CommitEntry {
	namespace, _ := layout.SplitName(info.Name)
	e := storage.CommitEntry{
		ID: a.ID, Name: info.Name, Namespace: namespace, ChainID: layout.ChainIDOf(info.Name, info.Labels),
		Parent: info.Parent, DiffID: info.Labels[layout.LabelDiffID],
		Entries: c.Entries, Bytes: c.Bytes, Digest: c.Digest,
		Time: info.Created, Strategy: storage.StrategySyncfs, BootID: s.bootID, RunID: s.runID, Epoch: s.layers.Epoch(),
	}
	if a.Lost {
		e.Strategy = storage.StrategySyncfsCursorLost
	}
	return e
}

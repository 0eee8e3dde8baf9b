package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/active"
	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/internal/gate"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/metrics"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// errCursorLost refuses the Commit of an extraction of an earlier daemon.
var errCursorLost = errors.New("the daemon was restarted since the extraction began, and errors of the disk in between are unknown")

// recovery is one recovery, with what its summary counts.
type recovery struct {
	*Snapshotter
	last    storage.Run // of the daemon before this one
	known   *layers.Recovery
	entries []storage.OpenEntry // of active rows
	there   map[uint64]bool     // numbers of directories in snapshots/

	applied []storage.CommitEntry // of layers whose trees may not be in their places

	committed, open, closed, removed int
}

// recover brings rows, journal and directories together again after any end of
// an earlier process. It runs before the socket answers, changes nothing that a
// row speaks of, and may itself be cut short and run again.
func (s *Snapshotter) recover(ctx context.Context) error {
	start := time.Now()
	faults.Point(faults.RecoverOpened)
	r := recovery{Snapshotter: s, there: map[uint64]bool{}}
	directories, err := namesBelow(s.root.Snapshots())
	if err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	for _, name := range directories {
		if id, numbered := layout.DirectoryID(name); numbered {
			r.there[id] = true
		}
	}
	rows := map[uint64]string{}
	if err := s.gate.View(ctx, func(ctx context.Context, j *storage.Journal) (err error) {
		if r.last, err = j.Run(); err != nil {
			return err
		}
		r.known = s.layers.Recover(r.last)
		return j.EachRow(func(row storage.BareRow) error {
			rows[row.ID] = row.Name
			switch row.Kind {
			case snapshots.KindActive:
				return r.readActive(ctx, j, row)
			case snapshots.KindCommitted:
				return r.readCommitted(ctx, j, row)
			}
			return nil
		})
	}); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	r.known.LearnMount()
	r.open = len(r.entries)
	// After the cursors of what is active are open: they get the errors too.
	old, err := s.gate.DrainErrors()
	if err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	if old != nil {
		log.G(ctx).WithError(old).Warn("the disk has failed before this start: check it")
	}
	if err := errors.Join(r.placeTrees(ctx), r.restoreRecords(ctx)); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	faults.Point(faults.RecoverRecords)
	if err := r.replay(ctx); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	faults.Point(faults.RecoverReplayed)
	s.trees.Settle(ctx)
	if r.removed, err = s.setAside(ctx, rows); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	faults.Point(faults.RecoverSetAside)
	metrics.RecoverySeconds.Set(time.Since(start).Seconds())
	for action, n := range map[string]int{"replayed": r.open, "closed": r.closed, "removed": r.removed, "unverified": r.known.Unverified} {
		metrics.RecoveryActions.WithLabelValues(action).Set(float64(n))
	}
	metrics.Set(metrics.ShutdownClean, !r.known.Unclean)
	log.G(ctx).WithFields(log.Fields{
		"committed": r.committed, "entries_replayed": r.open, "extractions_closed": r.closed,
		"directories_removed": r.removed, "directories_missing": r.known.Missing,
		"clean": !r.known.Unclean, "unverified": r.known.Unverified, "took": time.Since(start).String(),
	}).Info("recovered")
	faults.Point(faults.RecoverDone)
	return nil
}

// readActive opens a cursor for an active row and keeps its journal entry. The cursor
// knows nothing of errors before this moment.
func (r *recovery) readActive(ctx context.Context, j *storage.Journal, row storage.BareRow) error {
	_, info, _, err := storage.Info(ctx, row.Name)
	if err != nil {
		return err
	}
	id := row.ID
	e, err := j.GetOpen(id)
	if errors.Is(err, storage.ErrNoEntry) {
		e, err = r.missingOpen(ctx, id, info), nil
	}
	if err != nil {
		return err
	}
	if chainID, extraction := layout.ExtractionOf(info.Name, info.Labels); extraction && !e.Extraction {
		// Earlier versions took over a database of the built-in snapshotter
		// without this. CursorLost makes replay write it.
		e.Extraction, e.ChainID, e.CursorLost = true, chainID, false
	}
	r.entries = append(r.entries, e)
	// Any error: it concerns this snapshot, while those of the file system
	// show at snapshots/.
	writer, unusable := r.gate.OpenWriter(r.root.Dir(id), id)
	if unusable != nil {
		log.G(ctx).WithError(unusable).WithFields(log.Fields{"key": info.Name, "directory": r.root.Dir(id), "cure": "remove the snapshot, and its container; check the file system"}).
			Error("the directory of an active snapshot cannot be used: it can be removed, and not be mounted or committed")
		if writer, err = r.gate.OpenWriter(r.root.Snapshots(), id); err != nil {
			return err
		}
	}
	switch {
	case e.Poisoned != "":
		writer.Poison(errors.New(e.Poisoned))
	case e.Extraction:
		writer.Poison(errCursorLost)
	case unusable != nil:
		writer.Poison(fmt.Errorf("its directory cannot be used: %w", unusable))
	}
	r.actives.Add(info.Name, &active.Snapshot{ID: id, Extraction: e.Extraction, Writer: writer, Lost: true})
	return nil
}

// missingOpen makes the entry of an active row that has none: another
// snapshotter has used this root for a while.
func (r *recovery) missingOpen(ctx context.Context, id uint64, info snapshots.Info) storage.OpenEntry {
	log.G(ctx).WithField("key", info.Name).Warn("active snapshot without a journal entry: another snapshotter has used this root")
	_, extraction := layout.ExtractionOf(info.Name, info.Labels)
	e := r.openEntry(&active.Snapshot{ID: id, Extraction: extraction}, info.Name, info)
	e.Started = info.Created
	return e
}

// readCommitted compares a committed row with the journal and with what is there.
func (r *recovery) readCommitted(ctx context.Context, j *storage.Journal, row storage.BareRow) error {
	r.committed++
	e, err := j.GetCommitted(row.ID)
	adopted := errors.Is(err, storage.ErrNoEntry)
	if adopted {
		log.G(ctx).WithField("name", row.Name).Warn("committed snapshot without a journal entry: another snapshotter has used this root")
		var info snapshots.Info
		if _, info, _, err = storage.Info(ctx, row.Name); err == nil {
			e = r.commitEntry(&active.Snapshot{ID: row.ID}, info, seal.Summary{})
			e.Strategy, e.Epoch = storage.StrategyUnknown, 0
		}
	}
	if err != nil {
		return err
	}
	state, err := j.GetState(row.ID)
	if err != nil && !errors.Is(err, storage.ErrNoEntry) {
		return err
	}
	// The journal has the last daemon of each boot that has committed something: see layers' RecordRun.
	if e.Strategy == storage.StrategyApplied && e.BootID == r.last.BootID && e.BootID != r.bootID {
		r.applied = append(r.applied, e)
	}
	r.known.Add(ctx, row, e, state, adopted, r.there[row.ID])
	return nil
}

// placeTrees puts trees into their places that the machine forgot to be there when it went down: the Commit
// after an Apply does not sync that. It is on disk before the journal has this boot.
func (r *recovery) placeTrees(ctx context.Context) error {
	for _, e := range r.applied {
		err := r.gate.Do(ctx, func() error { return layout.PlaceAgain(r.root, e.ID) })
		logger := log.G(ctx).WithFields(log.Fields{"name": e.Name, "directory": r.root.Dir(e.ID)})
		switch {
		case isNotExist(err): // as nearly always
		case err == nil:
			logger.Info("tree of a layer put into its place")
		case gate.IsWriteFailure(err):
			return err
		default:
			logger.WithError(err).WithField("cure", "free space on the file system, or check it, and start the daemon again").
				Error("the tree of a layer could not be put into its place: the layer is not ready")
		}
	}
	return nil
}

// usable returns why the directory of an active snapshot cannot be mounted, or
// nil. Without it, the kernel's own error at the mount would name neither the
// snapshot nor the cure.
func (s *Snapshotter) usable(id uint64, info snapshots.Info) error {
	if info.Kind != snapshots.KindActive {
		return nil
	}
	dir := s.root.Tree(id)
	st, err := os.Lstat(dir)
	switch {
	case err == nil && st.IsDir():
		return nil
	case err == nil, isNotExist(err), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return fmt.Errorf("%s is missing or is no directory: remove the snapshot and its container, and create them again: %w", dir, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("the directory of the snapshot cannot be used: check the file system: %w: %w", err, errdefs.ErrUnavailable)
}

// restoreRecords makes the record of every active snapshot an active one again. A
// Commit that was cut short has changed it, and a rebuild would believe it. A
// snapshot whose record cannot be written goes without: only a rebuild needs it.
func (r *recovery) restoreRecords(ctx context.Context) error {
	for key, a := range r.actives.All() {
		dir := r.root.Dir(a.ID)
		var info snapshots.Info
		if err := r.gate.View(ctx, func(ctx context.Context, _ *storage.Journal) (err error) {
			_, info, _, err = storage.Info(ctx, key)
			return err
		}); err != nil {
			return err
		}
		want := layout.RecordOf(a.ID, info)
		if have, err := layout.ReadRecord(dir); err == nil && have.SameRow(want) {
			continue
		}
		if st, err := os.Lstat(dir); err != nil || !st.IsDir() {
			continue // readActives has logged it
		}
		full := false
		err := r.gate.Do(ctx, func() error {
			return r.gate.UnlessFull(ctx, func() error {
				err := layout.ReplaceRecordSync(dir, want)
				full = fsync.IsFull(err)
				return err
			})
		})
		switch {
		case full:
		case err == nil:
			log.G(ctx).WithField("key", key).Info("record of a snapshot set back to active")
		case gate.IsWriteFailure(err): // final, and logged by the gate
		default:
			log.G(ctx).WithError(err).WithFields(log.Fields{"key": key, "directory": dir, "cure": "make the directory writable, or remove the snapshot"}).
				Error("the record of a snapshot could not be set back to active: repair --rebuild would not restore the snapshot")
		}
	}
	return nil
}

// replay closes what earlier daemons left open. Their extractions were never
// acknowledged: they stay active rows, which containerd removes, and cannot be
// committed. Containers stay what they are, without their cursor.
func (r *recovery) replay(ctx context.Context) error {
	var changed []storage.OpenEntry
	for _, e := range r.entries {
		if e.CursorLost {
			continue // recorded by an earlier recovery
		}
		e.CursorLost = true
		if e.Extraction {
			r.closed++
			e.Abandoned = time.Now().UTC()
			log.G(ctx).WithFields(log.Fields{"key": e.Key, "id": e.ID, "same_boot": e.BootID == r.bootID}).
				Info("open extraction closed; its layer must be extracted again")
		}
		changed = append(changed, e)
	}
	full, err := r.gate.RecoverUpdate(ctx, func(_ context.Context, j *storage.Journal) error {
		for _, e := range changed {
			if err := j.PutOpen(e); err != nil {
				return err
			}
		}
		return r.known.Write(j)
	})
	if err == nil && !full {
		r.known.Written()
	}
	return err
}

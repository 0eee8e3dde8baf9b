package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// errCursorLost refuses the Commit of an extraction of an earlier daemon.
var errCursorLost = errors.New("the daemon was restarted since the extraction began, and errors of the disk in between are unknown")

// recovery counts what recover did, for its summary.
type recovery struct {
	committed, open, closed, removed, missing, unverified int

	unclean bool                  // the machine went down under the last daemon
	adopted []storage.CommitEntry // for rows that had no entry
	settled []storage.CommitEntry // of healings that were cut short
	states  []storage.StateEntry  // of the same
}

// recover brings rows, journal and directories together again after any end of
// an earlier process. It runs before the socket answers, changes nothing that a
// row speaks of, and may itself be cut short and run again.
func (s *Snapshotter) recover(ctx context.Context) error {
	start := time.Now()
	faults.Point(faults.RecoverOpened)
	var (
		r       recovery
		entries []storage.OpenEntry
	)
	var last storage.Run
	if err := s.db.View(ctx, func(ctx context.Context, j *storage.Journal) (err error) {
		if last, err = j.Run(); err != nil {
			return err
		}
		r.unclean = s.begin(last)
		if err := s.readActives(ctx, j, &entries); err != nil {
			return err
		}
		return s.checkCommitted(ctx, j, &r)
	}); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	r.open = len(entries)
	// After the cursors of what is active: they are told of it too.
	old, err := s.spendErrors()
	if err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	if old != nil {
		log.G(ctx).WithError(old).Warn("the disk has failed before this start: check it")
	}
	if err := s.restoreRecords(ctx); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	faults.Point(faults.RecoverRecords)
	if err := s.replay(ctx, entries, &r); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	faults.Point(faults.RecoverReplayed)
	if err := s.unlessFull(ctx, s.settleReplaced(last.BootID == s.bootID)); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	if r.removed, err = s.setAside(ctx); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	faults.Point(faults.RecoverSetAside)
	log.G(ctx).WithFields(log.Fields{
		"committed": r.committed, "entries_replayed": r.open, "extractions_closed": r.closed,
		"directories_removed": r.removed, "directories_missing": r.missing,
		"clean": !r.unclean, "unverified": r.unverified, "took": time.Since(start).String(),
	}).Info("recovered")
	faults.Point(faults.RecoverDone)
	return nil
}

// readActives opens a cursor for every active row and collects its journal
// entry. The cursor knows nothing of errors before this moment.
func (s *Snapshotter) readActives(ctx context.Context, j *storage.Journal, entries *[]storage.OpenEntry) error {
	return storage.Walk(ctx, func(id uint64, info snapshots.Info, _ snapshots.Usage) error {
		if info.Kind != snapshots.KindActive {
			return nil
		}
		e, err := j.GetOpen(id)
		if errors.Is(err, storage.ErrNoEntry) {
			e, err = s.missingOpen(ctx, id, info), nil
		}
		if err != nil {
			return err
		}
		*entries = append(*entries, e)
		cursor, err := fsync.OpenCursor(s.dir(id))
		if isNotExist(err) {
			log.G(ctx).WithError(err).WithField("key", info.Name).Error("the directory of an active snapshot is missing")
			cursor, err = fsync.OpenCursor(s.snapshotsDir())
		}
		if err != nil {
			return err
		}
		a := &active{id: id, extraction: e.Extraction, cursor: cursor, lost: true}
		switch {
		case e.Poisoned != "":
			a.refused = errors.New(e.Poisoned)
		case e.Extraction:
			a.refused = errCursorLost
		}
		s.actives[info.Name] = a
		return nil
	})
}

// missingOpen makes the entry of an active row that has none: another
// snapshotter has used this root for a while.
func (s *Snapshotter) missingOpen(ctx context.Context, id uint64, info snapshots.Info) storage.OpenEntry {
	log.G(ctx).WithField("key", info.Name).Warn("active snapshot without a journal entry: another snapshotter has used this root")
	_, extraction := extractionOf(info.Name, info.Labels)
	e := s.openEntry(&active{id: id, extraction: extraction}, info.Name, info)
	e.Started = info.Created
	return e
}

// checkCommitted compares committed rows with the journal and with what is
// there. A missing directory is said and not acted on: the row is what
// containerd was promised (I3).
func (s *Snapshotter) checkCommitted(ctx context.Context, j *storage.Journal, r *recovery) error {
	return storage.Walk(ctx, func(id uint64, info snapshots.Info, _ snapshots.Usage) error {
		if info.Kind != snapshots.KindCommitted {
			return nil
		}
		r.committed++
		e, err := j.GetCommitted(id)
		if errors.Is(err, storage.ErrNoEntry) {
			log.G(ctx).WithField("name", info.Name).Warn("committed snapshot without a journal entry: another snapshotter has used this root")
			e = s.commitEntry(&active{id: id}, info, seal.Summary{})
			e.Strategy, e.Epoch = storage.StrategyUnknown, 0
			r.adopted = append(r.adopted, e)
		} else if err != nil {
			return err
		}
		state, err := j.GetState(id)
		if err != nil && !errors.Is(err, storage.ErrNoEntry) {
			return err
		}
		e, state, cut := s.settleHealing(e, state)
		if e.Name != info.Name || e.Parent != info.Parent {
			// An entry of the built-in snapshotter's database knows only these.
			e.Name, e.Parent = info.Name, info.Parent
		}
		l := s.ready.add(e, state)
		if cut {
			r.settled, r.states = append(r.settled, e), append(r.states, l.state)
		}
		if l.state.State == storage.StateUnverified {
			r.unverified++
			return nil // whoever looks finds out
		}
		if _, damaged := rootFinding(filepath.Join(s.dir(id), "fs")); damaged {
			r.missing++
			s.lookForRoot(ctx, l)
			log.G(ctx).WithFields(log.Fields{"name": info.Name, "directory": s.dir(id)}).
				Error("the directory of a committed snapshot is missing")
		}
		return nil
	})
}

// restoreRecords makes the record of every active snapshot say active again. A
// Commit that was cut short has changed it, and a rebuild would believe it.
func (s *Snapshotter) restoreRecords(ctx context.Context) error {
	for key, a := range s.actives {
		dir := s.dir(a.id)
		var info snapshots.Info
		if err := s.db.View(ctx, func(ctx context.Context, _ *storage.Journal) (err error) {
			_, info, _, err = storage.Info(ctx, key)
			return err
		}); err != nil {
			return err
		}
		want := recordOf(a.id, info)
		if r, err := readRecord(dir); err == nil && r.sameRow(want) {
			continue
		}
		if _, err := os.Lstat(dir); isNotExist(err) {
			continue
		}
		log.G(ctx).WithField("key", key).Info("record of a snapshot set back to active")
		if err := s.unlessFull(ctx, replaceRecord(dir, want, true)); err != nil {
			return err
		}
	}
	return nil
}

// replay closes what earlier daemons left open. Their extractions were never
// acknowledged: they stay active rows, which containerd removes, and cannot be
// committed. Containers stay what they are, without their cursor.
func (s *Snapshotter) replay(ctx context.Context, entries []storage.OpenEntry, r *recovery) error {
	var changed []storage.OpenEntry
	for _, e := range entries {
		if e.CursorLost {
			continue // said by an earlier recovery
		}
		e.CursorLost = true
		if e.Extraction {
			r.closed++
			e.Abandoned = time.Now().UTC()
			log.G(ctx).WithFields(log.Fields{"key": e.Key, "id": e.ID, "same_boot": e.BootID == s.bootID}).
				Info("open extraction closed; its layer must be extracted again")
		}
		changed = append(changed, e)
	}
	err := s.db.Update(ctx, func(_ context.Context, j *storage.Journal) error {
		for _, e := range changed {
			if err := j.PutOpen(e); err != nil {
				return err
			}
		}
		for i := range r.adopted {
			if err := j.Commit(&r.adopted[i]); err != nil {
				return err
			}
		}
		for i, e := range r.settled {
			if err := errors.Join(j.Replace(e), j.PutState(r.states[i])); err != nil {
				return err
			}
		}
		return s.sayRun(j)
	})
	if err == nil {
		s.hasSaidRun()
		for _, e := range r.adopted {
			s.ready.add(e, storage.StateEntry{}) // with its number
		}
	}
	return s.unlessFull(ctx, err)
}

// unlessFull forgives recovery a step for which the disk has no space: the
// layers must be served all the same, and what fills the disk be removed. The
// next recovery takes the step again.
func (s *Snapshotter) unlessFull(ctx context.Context, err error) error {
	if !errors.Is(err, unix.ENOSPC) {
		return err
	}
	if s.db.Broken() != nil {
		s.onWriteFailure(ctx, err, undo{})
	}
	log.G(ctx).WithError(err).Warn("the disk is full: a step of the recovery is left to the next start")
	return nil
}

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// swap puts the new tree into its place. The journal knows of it before, so
// that after a crash at any instant it is clear which of the two trees is there:
// see settleHealing. When it returns true, dir is the damaged tree.
func (s *Snapshotter) swap(ctx context.Context, dir string, cursor *fsync.Cursor, failures int64, healed storage.CommitEntry) (exchanged bool, err error) {
	unlock, err := s.lockKey(ctx, healed.Name)
	if err != nil {
		return false, err
	}
	defer unlock()
	// As in Commit: no error of anybody may pass between our sync and our word.
	s.syncing.Lock()
	defer s.syncing.Unlock()
	if err := cursor.Sync(); err != nil {
		s.onWriteFailure(ctx, err, undo{})
		return false, err
	}
	if s.failures.Load() != failures {
		return false, errors.New("a write failed meanwhile, and what it was about is not known")
	}
	faults.Point(faults.HealSynced)
	ctx = context.WithoutCancel(ctx)
	update := func(state storage.StateEntry, replace bool) error {
		// What was found before must not be written after this.
		s.ready.saying.Lock()
		defer s.ready.saying.Unlock()
		s.ready.hush(healed.ID)
		err := s.db.Update(ctx, func(_ context.Context, j *storage.Journal) error {
			now, err := j.GetCommitted(healed.ID)
			if errors.Is(err, storage.ErrNoEntry) || err == nil && now.Sequence != healed.Sequence {
				return errRemoved
			}
			if err == nil && replace {
				err = j.Replace(healed)
			}
			return errors.Join(err, j.PutState(state))
		})
		if isWriteFailure(err) {
			s.onWriteFailure(ctx, err, undo{})
		}
		return err
	}
	if handled, err := s.mutantSwap(dir, healed, update); handled {
		return true, err
	}
	if err := update(storage.StateEntry{ID: healed.ID, State: storage.StateHealing, Healing: &healed}, false); err != nil {
		return false, err
	}
	faults.Point(faults.HealJournalled)
	if err := exchange(dir, s.dir(healed.ID)); err != nil {
		return false, err
	}
	faults.Point(faults.HealExchanged)
	if err := errors.Join(fsync.Dir(s.snapshotsDir()), fsync.Dir(s.healingDir())); err != nil {
		s.onWriteFailure(ctx, err, undo{})
		return true, err
	}
	faults.Point(faults.HealPlaced)
	if err := update(storage.StateEntry{ID: healed.ID, State: storage.StateReady, Epoch: s.ready.epoch, Checked: time.Now().UTC()}, true); err != nil {
		return true, err
	}
	faults.Point(faults.HealDone)
	if err := s.keepReplaced(dir); err != nil {
		log.G(ctx).WithError(err).Warn("the damaged tree of a healed layer was not put away; the next start does it")
	}
	return true, nil
}

// exchange swaps two directories at once (renameat2(2)). Where the second is
// gone, the first takes its name.
func exchange(dir, place string) error {
	if err := fsync.MkdirAll(filepath.Dir(place), 0o700); err != nil {
		return err
	}
	err := unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, place, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.ENOENT) {
		return os.Rename(dir, place)
	}
	if err != nil {
		return &os.LinkError{Op: "exchange", Old: dir, New: place, Err: err}
	}
	return nil
}

// keepReplaced keeps a tree that was replaced for the mounts that may use it:
// until a start under another boot, when there are none.
func (s *Snapshotter) keepReplaced(dir string) error {
	if err := fsync.MkdirAll(s.replacedDir(), 0o700); err != nil {
		return err
	}
	err := os.Rename(dir, filepath.Join(s.replacedDir(), fmt.Sprintf("%s.%s.%d", filepath.Base(dir), s.bootID, time.Now().UnixNano())))
	if isNotExist(err) {
		return nil // there was nothing to replace
	}
	return err
}

// settleReplaced clears healing/ and replaced/ at a start. A tree that a mount
// of this boot may use stays.
func (s *Snapshotter) settleReplaced(sameBoot bool) error {
	entries, err := os.ReadDir(s.healingDir())
	if err != nil && !isNotExist(err) {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(s.healingDir(), e.Name())
		if sameBoot {
			err = s.keepReplaced(dir)
		} else {
			err = os.Rename(dir, filepath.Join(s.removingDir(), fmt.Sprintf("healing-%s.%s", e.Name(), s.runID)))
		}
		if err != nil {
			return err
		}
	}
	if entries, err = os.ReadDir(s.replacedDir()); err != nil && !isNotExist(err) {
		return err
	}
	for _, e := range entries {
		if strings.Contains(e.Name(), s.bootID) {
			continue
		}
		if err := os.Rename(filepath.Join(s.replacedDir(), e.Name()), filepath.Join(s.removingDir(), "replaced-"+e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// settleHealing decides what a healing that was cut short has left in a
// layer's place: the record of a tree tells which seal is its own, and was
// synced before the journal spoke of it.
func (s *Snapshotter) settleHealing(e storage.CommitEntry, state storage.StateEntry) (storage.CommitEntry, storage.StateEntry, bool) {
	healed := state.Healing
	if healed == nil {
		return e, state, false
	}
	if s.mutantBelieves(healed) {
		return *healed, storage.StateEntry{ID: e.ID}, true
	}
	state.Healing = nil
	state.State = storage.StateDamaged
	if r, err := readRecord(s.dir(e.ID)); err == nil && r.Digest == healed.Digest {
		e = *healed
		state.State, state.Epoch = storage.StateUnverified, 0
		e.Epoch = 0 // to be looked at: it was never answered for
	}
	return e, state, true
}

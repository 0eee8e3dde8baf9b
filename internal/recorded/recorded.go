// Package recorded has what is on record of committed layers: what a daemon knows of
// them when it starts, by the journal and the records beside the trees that an earlier
// one has left. It writes nothing.
package recorded

import (
	"path/filepath"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Layers is what a journal has on committed layers.
type Layers struct {
	Run     storage.Run
	Entries []storage.CommitEntry // in the order of their ids
	Results []verify.Result       // of the same: what a start would know of them
}

// Read reads a journal as a daemon does that starts in a boot of the kernel.
func Read(j *storage.Journal, bootID string) (r Layers, err error) {
	if r.Run, err = j.Run(); err != nil {
		return r, err
	}
	states := map[uint64]storage.StateEntry{}
	if err := j.EachState(func(e storage.StateEntry) error { states[e.ID] = e; return nil }); err != nil {
		return r, err
	}
	epoch := Epoch(r.Run, bootID)
	entries := map[string]storage.CommitEntry{}
	if err := j.EachCommitted(func(e storage.CommitEntry) error {
		e = Identified(e)
		entries[e.Name] = e
		r.Entries = append(r.Entries, e)
		r.Results = append(r.Results, verify.Known(e, Judge(epoch, e, states[e.ID])))
		return nil
	}); err != nil {
		return r, err
	}
	for i, e := range r.Entries {
		e.ChainID = ChainID(e, func(name string) (storage.CommitEntry, bool) { e, ok := entries[name]; return e, ok })
		r.Entries[i].ChainID, r.Results[i].ChainID = e.ChainID, e.ChainID
	}
	return r, nil
}

// Epoch returns the number of the epoch of a boot, from the journal's entry of the last
// daemon. When the machine went down under that daemon, no earlier verification counts:
// a new epoch begins. It also begins when there is no entry: what another snapshotter or
// an older version has left counts as unverified, in epoch 0.
func Epoch(last storage.Run, bootID string) uint64 {
	if last.BootID == "" || WentDown(last, bootID) {
		return last.Epoch + 1
	}
	return last.Epoch
}

// WentDown reports whether the machine went down under the last daemon.
func WentDown(last storage.Run, bootID string) bool {
	return last.BootID != "" && last.BootID != bootID && last.Stopped.IsZero()
}

// Judge decides what is known of a committed snapshot when a daemon starts in an epoch,
// by what the journal has.
func Judge(epoch uint64, e storage.CommitEntry, s storage.StateEntry) storage.StateEntry {
	s.ID = e.ID
	if s.Tree != "" && s.Tree != e.Digest {
		// It is about a tree that was exchanged since.
		s = storage.StateEntry{ID: e.ID, Reported: s.Reported}
	}
	switch {
	case s.State == storage.StateDamaged, s.State == storage.StateHealing:
		s.State = storage.StateDamaged
		if s.Depth == "" {
			s.Depth = storage.DepthContent // an older version did not note it
		}
	case e.Digest == "":
		s.State, s.Reason = storage.StateUnverified, verify.NeverSealed(e)
	case e.Epoch == epoch, s.State == storage.StateReady && s.Epoch == epoch:
		s.State = storage.StateReady
	default:
		s.State = storage.StateUnverified
	}
	return s
}

// SettleHealing decides what a healing that was cut short has left in a
// layer's place: the record of a tree has which seal is its own, and was
// synced before the journal spoke of it.
func SettleHealing(root layout.Root, epoch uint64, e storage.CommitEntry, state storage.StateEntry) (storage.CommitEntry, storage.StateEntry, bool) {
	healed := state.Healing
	if healed == nil {
		return e, state, false
	}
	state.Healing = nil
	state.State = storage.StateDamaged
	r, err := layout.ReadRecord(root.Dir(e.ID))
	if err != nil {
		// The seal belongs to its tree as well, and its digest identifies it.
		r.Digest, _ = mtree.TextDigest(filepath.Join(root.Dir(e.ID), layout.SealFile))
	}
	if r.Digest == healed.Digest {
		e = *healed
		state = storage.StateEntry{ID: e.ID, State: storage.StateUnverified, Reported: state.Reported}
		e.Epoch = 0 // unverified: no caller ever got it
	}
	return e, state, true
}

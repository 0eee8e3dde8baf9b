package layers

import (
	"context"
	"errors"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/recorded"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Recovery makes known, at a start, what the journal has on committed layers. Its
// steps are called in their order: Add for each row, LearnMount, Write in the
// transaction that ends the recovery, Written after it.
type Recovery struct {
	Unclean             bool // the machine went down under the last daemon
	Unverified, Missing int  // layers that are not verified in this epoch; that have no directory

	s       *Layers
	adopted []storage.CommitEntry // for rows that had no entry
	settled []storage.CommitEntry // of healings that were cut short
	states  []storage.StateEntry  // of the same
}

// Recover begins the recovery after a daemon of which the journal has last.
func (s *Layers) Recover(last storage.Run) *Recovery {
	return &Recovery{Unclean: s.recorder.begin(last), s: s}
}

// Add makes the layer of a row known. adopted: the journal does not have its entry yet. there:
// snapshots/ has a directory with its number. A missing one is logged and not acted on: the
// row is what containerd was promised (I3). What is in a directory is for the calls that
// need it, and for Run: a start must not wait for the disk once per layer.
func (r *Recovery) Add(ctx context.Context, row storage.BareRow, e storage.CommitEntry, state storage.StateEntry, adopted, there bool) {
	s := r.s
	if adopted {
		r.adopted = append(r.adopted, e)
	}
	e, state, cut := recorded.SettleHealing(s.root, s.table.epoch, e, state)
	// An entry of the built-in snapshotter's database knows only these.
	e.Name, e.Parent = row.Name, row.Parent
	l := s.table.add(e, state)
	if cut {
		r.settled, r.states = append(r.settled, e), append(r.states, l.state)
	}
	if l.state.State == storage.StateUnverified {
		r.Unverified++ // a verification finds out
	} else if !there {
		r.Missing++
		s.table.checkRoot(ctx, l)
		log.G(ctx).WithFields(log.Fields{"name": e.Name, "directory": s.root.Dir(e.ID)}).
			Error("the directory of a committed snapshot is missing")
	}
}

// LearnMount takes snapshots/ as it is for what it has to be, unless it was a mount
// of its own and is none now.
func (r *Recovery) LearnMount() {
	s := r.s
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	if !s.table.brake.Unmounted() {
		s.table.brake.LearnMount()
	}
}

// Write brings into the journal what was adopted and settled, and that this daemon
// has the root.
func (r *Recovery) Write(j *storage.Journal) error {
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
	return r.s.recorder.RecordRun(j)
}

// Written is called when the transaction of Write is durable.
func (r *Recovery) Written() {
	r.s.recorder.RunRecorded()
	for _, e := range r.adopted {
		r.s.table.add(e, storage.StateEntry{}) // with its number
	}
}

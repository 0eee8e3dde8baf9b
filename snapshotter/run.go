package snapshotter

import (
	"context"
	"time"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// epochOf returns the number of the epoch of a boot, out of the journal's word on
// the last daemon. When the machine went down under that daemon, nothing that
// was looked at before counts: a new epoch begins. It also begins when there is
// no word: what another snapshotter or an older version has left counts as not
// looked at, in epoch 0.
func epochOf(last storage.Run, bootID string) uint64 {
	if last.BootID == "" || wentDown(last, bootID) {
		return last.Epoch + 1
	}
	return last.Epoch
}

// wentDown reports whether the machine went down under the last daemon.
func wentDown(last storage.Run, bootID string) bool {
	return last.BootID != "" && last.BootID != bootID && last.Stopped.IsZero() && !faults.Mutant("unclean-boot-overlooked")
}

// begin notes that this daemon has the root now.
func (s *Snapshotter) begin(last storage.Run) (unclean bool) {
	s.ready.epoch = epochOf(last, s.bootID)
	s.run = storage.Run{BootID: s.bootID, RunID: s.runID, Epoch: s.ready.epoch, Started: time.Now().UTC()}
	return wentDown(last, s.bootID)
}

// sayRun writes into the journal that this daemon has the root, unless it has
// done so. Recovery does it before the socket answers; on a full disk it is the
// first Commit that does, so that no layer can outlive it.
func (s *Snapshotter) sayRun(j *storage.Journal) error {
	s.mu.Lock()
	run, said := s.run, s.said
	s.mu.Unlock()
	if said {
		return nil
	}
	return j.PutRun(run)
}

// hasSaidRun is called after a transaction with sayRun.
func (s *Snapshotter) hasSaidRun() {
	s.mu.Lock()
	s.said = true
	s.mu.Unlock()
}

// sayGoodbye notes a clean stop. Without it, the next boot looks at all layers.
func (s *Snapshotter) sayGoodbye() {
	ctx := context.WithoutCancel(s.background)
	s.saySoon(ctx)
	run := s.run
	run.Stopped = time.Now().UTC()
	if err := s.db.Update(ctx, func(_ context.Context, j *storage.Journal) error { return j.PutRun(run) }); err != nil {
		log.G(ctx).WithError(err).Warn("a clean stop was not noted; after a boot all layers are looked at")
	}
}

package snapshotter

import (
	"context"
	"time"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// begin decides, out of the journal's word on the last daemon, whether the
// machine went down under it. Then nothing that was looked at before counts: a
// new epoch begins.
func (s *Snapshotter) begin(last storage.Run) (unclean bool) {
	// Without a word there was no daemon, or an older one whose layers count as
	// not looked at: epoch 0.
	known := last.BootID != ""
	unclean = known && last.BootID != s.bootID && last.Stopped.IsZero()
	s.ready.epoch = last.Epoch
	if unclean || !known {
		s.ready.epoch++
	}
	s.run = storage.Run{BootID: s.bootID, RunID: s.runID, Epoch: s.ready.epoch, Started: time.Now().UTC()}
	return unclean
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

package snapshotter

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Labels on Stat's answer about a committed snapshot. They are not stored.
const (
	labelPrefix   = "durable-snapshotter/"
	labelState    = labelPrefix + "state"    // one of the State constants
	labelSealed   = labelPrefix + "sealed"   // time of the commit, RFC 3339
	labelStrategy = labelPrefix + "strategy" // how it was made durable
)

// setState notes what a look has found. readiness.mu must be held; saySoon or
// the next tick of watch brings it into the journal.
func (s *Snapshotter) setState(ctx context.Context, l *layer, c CheckResult) {
	was := l.state.State
	l.state.State, l.state.Findings, l.state.Reason = c.State, c.Findings, c.Reason
	l.state.Epoch, l.state.Checked = s.ready.epoch, time.Now().UTC()
	if !c.Deep.IsZero() {
		l.state.Deep = c.Deep
	}
	s.ready.unsaid[l.entry.ID] = l.state
	s.tellReady(l)
	if c.State == storage.StateDamaged && was != storage.StateDamaged {
		l.tried = time.Time{}
		log.G(ctx).WithFields(log.Fields{"name": l.entry.Name, "id": l.entry.ID, "findings": findingTexts(c.Findings), "reason": c.Reason}).
			Error("A LAYER IS DAMAGED")
	}
}

// tellReady tells of a layer that is ready after somebody was told that it is
// not. readiness.mu must be held.
func (s *Snapshotter) tellReady(l *layer) {
	if l.state.State != storage.StateReady || !l.refused {
		return
	}
	l.refused = false
	if s.cfg.OnReady != nil {
		s.cfg.OnReady(l.entry)
	}
}

// findingTexts are the first findings, for the log.
func findingTexts(findings []seal.Finding) (texts []string) {
	for _, f := range findings[:min(len(findings), 5)] {
		texts = append(texts, f.String())
	}
	return texts
}

// saySoon brings what looks have found into the journal. What cannot be written
// now is kept for the next time; lost by a crash, it costs another look.
func (s *Snapshotter) saySoon(ctx context.Context) {
	r := &s.ready
	r.saying.Lock()
	defer r.saying.Unlock()
	r.mu.Lock()
	unsaid := r.unsaid
	r.unsaid = map[uint64]storage.StateEntry{}
	r.mu.Unlock()
	if len(unsaid) == 0 {
		return
	}
	err := s.db.Update(context.WithoutCancel(ctx), func(_ context.Context, j *storage.Journal) error {
		for _, id := range slices.Sorted(maps.Keys(unsaid)) {
			if _, err := j.GetCommitted(id); errors.Is(err, storage.ErrNoEntry) {
				continue // removed meanwhile
			} else if err != nil {
				return err
			}
			if err := j.PutState(unsaid[id]); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil {
		return
	}
	log.G(ctx).WithError(err).Warn("states of layers were not written")
	r.mu.Lock()
	for id, state := range unsaid {
		if _, newer := r.unsaid[id]; !newer {
			r.unsaid[id] = state
		}
	}
	r.mu.Unlock()
	if isWriteFailure(err) {
		s.onWriteFailure(ctx, err, undo{})
	}
}

// hush takes back what was to be written about a layer.
func (r *readiness) hush(id uint64) {
	r.mu.Lock()
	delete(r.unsaid, id)
	r.mu.Unlock()
}

// withState adds to Stat's answer what is known of the layer.
func (s *Snapshotter) withState(info snapshots.Info) snapshots.Info {
	s.ready.mu.Lock()
	defer s.ready.mu.Unlock()
	l := s.ready.layers[info.Name]
	if l == nil {
		return info
	}
	info.Labels = maps.Clone(info.Labels)
	if info.Labels == nil {
		info.Labels = map[string]string{}
	}
	info.Labels[labelState] = l.state.State
	info.Labels[labelSealed] = l.entry.Time.Format(time.RFC3339Nano)
	info.Labels[labelStrategy] = l.entry.Strategy
	return info
}

// withoutState takes out what withState has added, of a client that changes
// labels by writing back what it was told.
func withoutState(labels map[string]string) map[string]string {
	labels = maps.Clone(labels)
	maps.DeleteFunc(labels, func(k, _ string) bool { return strings.HasPrefix(k, labelPrefix) })
	return labels
}

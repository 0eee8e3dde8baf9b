// Package active has what this process knows of active snapshots beyond their rows: the
// descriptor that reports the errors of their writes, and what was applied to them.
//
// All of it goes with the process. An extraction that was open when a daemon ended can
// therefore not be committed by the next one.
package active

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/gate"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/marks"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
)

// Snapshot is what this process knows of an active snapshot.
type Snapshot struct {
	ID         uint64
	Extraction bool
	Writer     *gate.Writer
	Lost       bool // the Writer was opened after a restart, not at Prepare
	// Unfollow ends what begins the writing of an extraction while it is made; nil when
	// nothing does.
	Unfollow context.CancelFunc

	// Guarded by Set.mu.
	running *run
	made    *Layer
	beside  bool
}

// Layer is what an Apply has made: a tree that is on disk, with its seal, but not in its
// place. It is not changed any more.
type Layer struct {
	Dirs   *marks.TarDirs // the directories that have an entry in the layer's tar
	Sealed bool           // marks are in order, and there is a seal; else the parent must be known for that
	Sum    seal.Summary
	Found  layout.OverlayMarks
	// Contents is the digest of the content digests beside the tree, "" when there are none.
	Contents string
}

// run is an Apply that runs.
type run struct {
	cancel context.CancelFunc
	ended  chan struct{}
}

// ErrApplying is returned for what cannot be done during an Apply.
var ErrApplying = fmt.Errorf("its layer is being applied: %w", errdefs.ErrUnavailable)

// Set is all active snapshots, by their keys. The zero Set is empty. It may be used from many
// goroutines.
type Set struct {
	mu    sync.Mutex
	byKey map[string]*Snapshot
}

// Get returns the active snapshot of a key, nil when there is none.
func (s *Set) Get(key string) *Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byKey[key]
}

// Numbered returns the active snapshot whose directory has a number, and its key, nil when
// there is none.
func (s *Set) Numbered(id uint64) (string, *Snapshot) {
	for key, a := range s.All() {
		if a.ID == id {
			return key, a
		}
	}
	return "", nil
}

// All returns the snapshots by their keys.
func (s *Set) All() map[string]*Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.byKey)
}

// Add adds an active snapshot.
func (s *Set) Add(key string, a *Snapshot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byKey == nil {
		s.byKey = map[string]*Snapshot{}
	}
	s.byKey[key] = a
}

// Forget drops what the process knows of an active snapshot that is no more.
func (s *Set) Forget(key string) {
	s.mu.Lock()
	a := s.byKey[key]
	delete(s.byKey, key)
	s.mu.Unlock()
	if a != nil {
		a.Leave()
		_ = a.Writer.Close() // a read-only descriptor has nothing to lose
	}
}

// Leave ends what follows the extraction. It may be called again.
func (a *Snapshot) Leave() {
	if a.Unfollow != nil {
		a.Unfollow()
	}
}

// Close closes all Writers, and forgets them.
func (s *Set) Close() (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.byKey {
		a.Leave()
		err = errors.Join(err, a.Writer.Close())
	}
	clear(s.byKey)
	return err
}

// Begin notes that an Apply runs, until end is called with what it has made, nil when it
// has failed. Its context ends with StopApply. The error is ErrApplying when another one
// runs, and FailedPrecondition when one has succeeded.
func (s *Set) Begin(ctx context.Context, a *Snapshot) (_ context.Context, end func(*Layer), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.running != nil {
		return nil, nil, ErrApplying
	}
	if a.made != nil {
		return nil, nil, fmt.Errorf("a layer was applied already: %w", errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := context.WithCancel(ctx)
	running := &run{cancel: cancel, ended: make(chan struct{})}
	a.running = running
	return ctx, func(made *Layer) {
		cancel()
		s.mu.Lock()
		defer s.mu.Unlock()
		a.running, a.made, a.beside = nil, made, made != nil
		close(running.ended)
	}, nil
}

// Made returns what Apply has made for a snapshot, nil if nothing, and whether that is
// not in its place yet. The error is ErrApplying while one runs.
func (s *Set) Made(a *Snapshot) (made *Layer, beside bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.running != nil {
		return nil, false, ErrApplying
	}
	return a.made, a.beside, nil
}

// Placed notes that what Apply has made is in its place.
func (s *Set) Placed(a *Snapshot) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a.beside = false
}

// StopApply ends an Apply that runs, and waits for its end.
func (s *Set) StopApply(key string) {
	s.mu.Lock()
	var running *run
	if a := s.byKey[key]; a != nil {
		running = a.running
	}
	s.mu.Unlock()
	if running != nil {
		running.cancel()
		<-running.ended
	}
}

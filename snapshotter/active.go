package snapshotter

import (
	"errors"
	"sync"

	"github.com/durable-snapshotter/durable-snapshotter/internal/gate"
)

// active is what this process knows of an active snapshot.
type active struct {
	id         uint64
	extraction bool
	writer     *gate.Writer
	lost       bool // the writer was opened after a restart, not at Prepare
}

// actives are the active snapshots, by their keys.
type actives struct {
	mu    sync.Mutex
	byKey map[string]*active
}

// get returns the active snapshot of a key, nil when there is none.
func (s *actives) get(key string) *active {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byKey[key]
}

func (s *actives) add(key string, a *active) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.byKey[key] = a
}

// forget drops what the process knows of an active snapshot that is no more.
func (s *actives) forget(key string) {
	s.mu.Lock()
	a := s.byKey[key]
	delete(s.byKey, key)
	s.mu.Unlock()
	if a != nil {
		_ = a.writer.Close() // a read-only descriptor has nothing to lose
	}
}

// close closes all writers, and forgets them.
func (s *actives) close() (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.byKey {
		err = errors.Join(err, a.writer.Close())
	}
	clear(s.byKey)
	return err
}

package layers

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// setThere moves the time of the last lstat of every layer.
func setThere(s *daemon, at time.Time) {
	s.layers.mu.Lock()
	defer s.layers.mu.Unlock()
	for _, l := range s.layers.table.layers {
		l.there = at
	}
}

// TestLately: Mounts remembers for a moment that the directory of a layer below was there, and
// nothing else does.
func TestLately(t *testing.T) {
	m := newMachine(t, 3)
	s := m.boot(false)
	m.pull(s)
	prepareWhenReady(t, s, "container", m.name(2))
	setThere(s, time.Now().Add(time.Hour))
	aside := filepath.Join(t.TempDir(), "aside")
	rename := func(from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	rename(m.tree(s, 2), aside)
	if s.layers.Lately(m.name(2)) {
		t.Error("the directory of the snapshot itself is gone")
	}
	rename(aside, m.tree(s, 2))
	rename(m.tree(s, 0), aside)
	if !s.layers.Lately(m.name(2)) {
		t.Error("a layer below was examined although it was there a moment ago")
	}
	if s.layers.whole(m.name(2), false, 0) {
		t.Error("what Prepare, View and heals go by remembers")
	}
	setThere(s, time.Now().Add(-remembered))
	if s.layers.Lately(m.name(2)) {
		t.Error("remembered for more than a second")
	}
	rename(aside, m.tree(s, 0))
	if !s.layers.Lately(m.name(2)) {
		t.Fatal("all directories are there")
	}
	rename(m.tree(s, 0), aside)
	setThere(s, time.Time{})
	if _, err := s.Mounts(t.Context(), "container"); err != nil {
		t.Fatal(err)
	}
	m.wantWhole(s)
}

// TestLatelyForgets: no lstat counts any more that was before one of these events.
func TestLatelyForgets(t *testing.T) {
	for name, event := range map[string]func(*testing.T, *machine, *daemon) error{
		"healed": func(t *testing.T, m *machine, s *daemon) error {
			err := os.Remove(filepath.Join(m.tree(s, 0), "link"))
			if err == nil {
				_, err = s.layers.Repair(t.Context(), RepairOptions{Apply: true})
			}
			return err
		},
		"found damaged and whole when it was verified again": func(t *testing.T, m *machine, s *daemon) error {
			l := s.layers.get(m.name(0))
			s.layers.mu.Lock()
			defer s.layers.mu.Unlock()
			c := verify.New(l.entry)
			c.Depth, c.Order = storage.DepthMetadata, s.layers.table.begin()
			c.Damaged(finding.Finding{Path: "link", What: "missing"})
			s.layers.note(t.Context(), l, c)
			c = verify.New(l.entry)
			c.State, c.Depth, c.Order = storage.StateReady, storage.DepthMetadata, s.layers.table.begin()
			s.layers.note(t.Context(), l, c)
			return nil
		},
		"suspected and whole": func(t *testing.T, m *machine, s *daemon) error {
			_, e := s.layers.current(s.layers.get(m.name(0)))
			_ = s.layers.suspect(t.Context(), e, mtree.ErrUnsealed)
			return s.layers.Wait(t.Context(), m.name(0), true)
		},
		"removed and committed again": func(t *testing.T, m *machine, s *daemon) error {
			for i := 2; i >= 0; i-- {
				if err := s.Remove(t.Context(), m.name(i)); err != nil {
					return err
				}
			}
			m.pull(s)
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, 3)
			s := m.boot(false)
			m.pull(s)
			setThere(s, time.Now().Add(time.Hour))
			if err := event(t, m, s); err != nil {
				t.Fatal(err)
			}
			m.wantStates(s, "after it", "ready", "ready", "ready")
			l := s.layers.get(m.name(0))
			s.layers.mu.Lock()
			defer s.layers.mu.Unlock()
			if l.there.After(time.Now()) {
				t.Error("an lstat before it still counts")
			}
		})
	}
}

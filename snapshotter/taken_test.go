package snapshotter

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// ids returns the numbers of the committed snapshots by their names.
func ids(t *testing.T, s *Snapshotter) map[string]uint64 {
	t.Helper()
	all := map[string]uint64{}
	for _, e := range journalOf(t, s).Committed {
		all[e.Name] = e.ID
	}
	return all
}

// wantTidy waits until there is one directory for each row, and fails unless no
// snapshot is active.
func wantTidy(t *testing.T, s *Snapshotter) {
	t.Helper()
	j := journalOf(t, s)
	if len(j.Open) > 0 {
		t.Errorf("still active: %+v", j.Open)
	}
	want := map[string]bool{}
	for _, e := range j.Committed {
		want[fmt.Sprint(e.ID)] = true
	}
	var have map[string]bool
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		have = map[string]bool{}
		for _, dir := range []string{s.root.Snapshots(), s.root.Removing()} {
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				have[e.Name()] = true
			}
		}
		if maps.Equal(have, want) {
			return
		}
	}
	t.Errorf("directories %v, want %v", have, want)
}

// TestCommitOfALayerThatIsHere: containerd has lost its database, or the end of a
// transaction, and asks for the names that it gave out before. The layers are ready,
// so they stay, and every Commit succeeds; also when a client commits twice at once.
func TestCommitOfALayerThatIsHere(t *testing.T) {
	m := newMachine(t, 3)
	s := m.boot(false)
	m.pull(s)
	before := ids(t, s)
	m.pull(s)
	if now := ids(t, s); !maps.Equal(now, before) {
		t.Errorf("layers %v, were %v", now, before)
	}
	wantTidy(t, s)
	crash(t, s)
	s = m.boot(true)
	m.wantStates(s, "killed", "ready", "ready", "ready")
	m.wantWhole(s)

	var committing sync.WaitGroup
	name := "k8s.io/100/" + m.ChainIDs[0]
	for i := range 4 {
		key := fmt.Sprintf("k8s.io/%d/extract-%d-x %s", 90+i, i, m.ChainIDs[0])
		m.Extract(t, s, 0, key, "")
		committing.Go(func() {
			if err := s.Commit(t.Context(), name, key); err != nil {
				t.Errorf("%s: %v", key, err)
			}
		})
	}
	committing.Wait()
	wantTidy(t, s)
	m.wantWhole(s)
}

// TestCommitReplacesWhatIsNotReady: the snapshot that has the name is damaged, is not
// verified, stands on another parent, or is another layer. It goes, with what stands
// on it, and the new one is committed.
func TestCommitReplacesWhatIsNotReady(t *testing.T) {
	for name, spoil := range map[string]func(m *machine, s *Snapshotter) *Snapshotter{
		"damaged": func(m *machine, s *Snapshotter) *Snapshotter {
			if err := errors.Join(os.RemoveAll(m.Content), os.Remove(filepath.Join(m.tree(s, 0), "link"))); err != nil {
				m.Fatal(err)
			}
			m.repair(s, layers.RepairOptions{Apply: true})
			m.wantRefused(s, "damaged", 0)
			return s
		},
		"removed from the disk": func(m *machine, s *Snapshotter) *Snapshotter {
			if err := errors.Join(os.RemoveAll(m.Content), os.RemoveAll(filepath.Dir(m.tree(s, 0)))); err != nil {
				m.Fatal(err)
			}
			return s
		},
		"not verified": func(m *machine, s *Snapshotter) *Snapshotter {
			crash(m.T, s)
			s = m.boot(false)
			m.wantStates(s, "booted", "unverified", "unverified", "unverified")
			return s
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, 3)
			s := m.boot(false)
			m.pull(s)
			if _, err := s.Prepare(t.Context(), "k8s.io/50/container", m.name(2)); err != nil {
				t.Fatal(err)
			}
			before := ids(t, s)
			s = spoil(m, s)
			m.pull(s)
			for name, id := range ids(t, s) {
				if before[name] == id {
					t.Errorf("%s is the same snapshot as before", name)
				}
			}
			m.wantStates(s, "pulled again", "ready", "ready", "ready")
			m.wantWhole(s)
			wantTidy(t, s)
			for i := range m.ChainIDs {
				if _, err := s.Stat(t.Context(), m.name(i)); err != nil {
					t.Error(err)
				}
			}
			crash(t, s)
			s = m.boot(true)
			m.wantStates(s, "killed", "ready", "ready", "ready")
		})
	}
}

// TestCommitOfAnotherLayer: a name that is taken by another layer, or by the same one
// on another parent, becomes that of the new one.
func TestCommitOfAnotherLayer(t *testing.T) {
	m := newMachine(t, 2)
	s := m.boot(false)
	m.pull(s)

	other := "k8s.io/101/" + m.ChainIDs[0]
	m.Extract(t, s, 0, "k8s.io/100/extract-1-x "+m.ChainIDs[0], "")
	if err := s.Commit(t.Context(), other, "k8s.io/100/extract-1-x "+m.ChainIDs[0]); err != nil {
		t.Fatal(err)
	}
	key := "k8s.io/102/extract-2-x " + m.ChainIDs[1]
	m.Extract(t, s, 1, key, other)
	if err := s.Commit(t.Context(), m.name(1), key); err != nil {
		t.Fatal(err)
	}
	if e := m.entry(s, 1); e.Parent != other {
		t.Errorf("the parent is %s, want %s", e.Parent, other)
	}
	wantTidy(t, s)

	const unnamed = "k8s.io/7/a-name-of-its-own"
	addLayer(t, s, unnamed[strings.LastIndex(unnamed, "/")+1:], "")
	for i := range 2 {
		key := fmt.Sprintf("k8s.io/11%d/extract-3-x %s", i, m.ChainIDs[i])
		m.Extract(t, s, i, key, "")
		if err := s.Commit(t.Context(), unnamed, key); err != nil {
			t.Fatal(err)
		}
	}
	if f := filepath.Join(s.root.Tree(ids(t, s)[unnamed]), "dir", "own1"); !exists(f) {
		t.Errorf("%s is not there: the name stands for the old layer", f)
	}
	wantTidy(t, s)
	m.wantWhole(s)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// TestCommitUnderATakenName: only the Commit of an extraction settles a name, and only
// one that a committed snapshot has.
func TestCommitUnderATakenName(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	if _, err := s.Prepare(t.Context(), "k8s.io/50/container", m.name(0)); err != nil {
		t.Fatal(err)
	}
	key := "k8s.io/60/extract-1-x " + m.ChainIDs[0]
	m.Extract(t, s, 0, key, "")
	for name, key := range map[string]string{
		m.name(0):             "k8s.io/50/container", // of a container
		"k8s.io/50/container": key,                   // of an extraction, but the name is an active key
	} {
		if err := s.Commit(t.Context(), name, key); !errdefs.IsAlreadyExists(err) {
			t.Errorf("commit %s as %s: %v", key, name, err)
		}
	}
	if err := s.Commit(t.Context(), m.name(0), "k8s.io/0/extract-0-x "+m.ChainIDs[0]); !errdefs.IsAlreadyExists(err) {
		t.Errorf("commit a second time: %v", err)
	}
	info, err := s.Stat(t.Context(), "k8s.io/50/container")
	if err != nil || info.Kind != snapshots.KindActive {
		t.Errorf("%+v, %v", info, err)
	}
	if e := m.entry(s, 0); e.Strategy != storage.StrategySyncfs {
		t.Errorf("%+v", e)
	}
}

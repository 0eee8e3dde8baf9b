package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// machine is a root and a content store that outlive daemons and boots.
type machine struct {
	*testing.T
	*treetest.Image
	root    string
	boots   int
	damaged chan *layers.DamagedError
	ready   chan storage.CommitEntry
	config  func(*Config) // nil: nothing to add
}

// newMachine has an image of so many layers in its content store.
func newMachine(t *testing.T, layers int) *machine {
	t.Helper()
	var tars [][]byte
	for i := range layers {
		tars = append(tars, treetest.LayerTar(t, i))
	}
	return newMachineOf(t, tars)
}

// newMachineOf has an image of these layers in its content store.
func newMachineOf(t *testing.T, tars [][]byte) *machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("overlay mounts need root")
	}
	quiet(t)
	return &machine{
		T: t, Image: treetest.NewImage(t, tars), root: t.TempDir(),
		damaged: make(chan *layers.DamagedError, 100), ready: make(chan storage.CommitEntry, 100),
	}
}

func (m *machine) name(i int) string { return m.Image.Name(i) }

func (m *machine) pull(s *Snapshotter) { m.Pull(m.T, s) }

// boot starts a daemon, on a kernel that was booted anew unless same.
func (m *machine) boot(same bool) *Snapshotter {
	m.Helper()
	if !same {
		m.boots++
	}
	cfg := Config{
		Root: m.root, JournalHistory: 10, ContentRoot: m.Content, BootID: fmt.Sprint("boot-", m.boots), NoBackground: true,
		OnDamaged: func(e *layers.DamagedError) { m.damaged <- e },
		OnReady:   func(e storage.CommitEntry) { m.ready <- e },
	}
	if m.config != nil {
		m.config(&cfg)
	}
	s, err := New(m.Context(), cfg)
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { stop(m.T, s) })
	return s
}

// crash ends a daemon without its last words: the journal does not have that it has
// stopped.
func crash(t *testing.T, s *Snapshotter) {
	t.Helper()
	stop(t, s)
	forgetStop(t, s.cfg.Root)
}

// forgetStop takes the clean stop of a daemon out of its journal.
func forgetStop(t testing.TB, root string) {
	t.Helper()
	db, err := storage.Open(context.Background(), root, storage.Options{})
	treetest.Check(t, err)
	treetest.Check(t, errors.Join(db.Update(context.Background(), func(_ context.Context, j *storage.Journal) error {
		run, err := j.Run()
		if err != nil {
			return err
		}
		run.Stopped = time.Time{}
		return j.PutRun(run)
	}), db.Close()))
}

// known is what is known of layer i.
func (m *machine) known(s *Snapshotter, i int) verify.Result {
	m.Helper()
	r, err := s.Inspect(m.Context())
	fatal(m.T, err)
	for _, l := range r.Layers {
		if l.Name == m.name(i) {
			return l
		}
	}
	m.Fatalf("layer %d is not known", i)
	return verify.Result{}
}

func (m *machine) entry(s *Snapshotter, i int) storage.CommitEntry {
	m.Helper()
	for _, e := range journalOf(m.T, s).Committed {
		if e.Name == m.name(i) {
			return e
		}
	}
	m.Fatalf("layer %d is not in the journal", i)
	return storage.CommitEntry{}
}

func (m *machine) tree(s *Snapshotter, i int) string { return s.root.Tree(m.known(s, i).ID) }

// wantStates compares the states of the layers with the words.
func (m *machine) wantStates(s *Snapshotter, when string, want ...storage.State) {
	m.Helper()
	for i, w := range want {
		if have := m.known(s, i).State; have != w {
			m.Errorf("%s: layer %d is %s, want %s", when, i, have, w)
		}
	}
}

// wantWhole looks at all layers, also at their seals.
func (m *machine) wantWhole(s *Snapshotter) {
	m.Helper()
	for _, e := range journalOf(m.T, s).Committed {
		r, err := verify.Layer(m.Context(), m.root, e, verify.Options{})
		if err != nil || r.State != storage.StateReady {
			m.Errorf("%s: %+v, %v", e.Name, r, err)
		}
	}
}

func (m *machine) repair(s *Snapshotter, o layers.RepairOptions) []layers.RepairResult {
	m.Helper()
	results, err := s.layers.Repair(m.Context(), o)
	if err != nil {
		m.Fatal(err)
	}
	return results
}

func (m *machine) wantRefused(s *Snapshotter, when string, i int) {
	m.Helper()
	if _, err := s.Stat(m.Context(), m.name(i)); err == nil {
		m.Errorf("%s: layer %d is reported as whole", when, i)
	}
}

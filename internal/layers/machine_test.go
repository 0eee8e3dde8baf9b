package layers

import (
	"context"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/recorded"
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
	damaged chan *DamagedError
	ready   chan storage.CommitEntry
	config  func(*DaemonConfig) // nil: nothing to add
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
		damaged: make(chan *DamagedError, 100), ready: make(chan storage.CommitEntry, 100),
	}
}

func (m *machine) name(i int) string { return m.Image.Name(i) }

func (m *machine) pull(s *daemon) { m.Pull(m.T, s) }

// Daemon is a snapshotter.Snapshotter, DaemonConfig its configuration; daemon_test.go
// sets the functions.
type Daemon interface {
	snapshots.Snapshotter
	snapshots.Cleaner
	Stopping()
}

type DaemonConfig struct {
	Root, ContentRoot, BootID string
	MountOptions, Archives    []string
	NoBackground              bool
	OnDamaged                 func(*DamagedError)
	OnReady                   func(storage.CommitEntry)
	OnBrake                   func(string)
	OnOutside                 func(storage.CommitEntry, blobs.Blob)
}

var (
	StartDaemon func(context.Context, DaemonConfig) (Daemon, *Layers, error)
	RepairRoot  func(context.Context, DaemonConfig, RepairOptions) ([]RepairResult, error)
	Rebuild     func(ctx context.Context, root string) (committed int, err error)
)

// daemon is a running one.
type daemon struct {
	Daemon
	layers *Layers
	root   layout.Root
}

// holdVerifications lets no verification begin until release is called.
func (d *daemon) holdVerifications() (release func()) {
	for range cap(d.layers.verifying) {
		d.layers.verifying <- struct{}{}
	}
	return func() {
		for range cap(d.layers.verifying) {
			<-d.layers.verifying
		}
	}
}

// start starts a daemon, for the test.
func start(t *testing.T, c DaemonConfig) *daemon {
	t.Helper()
	d, l, err := StartDaemon(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	s := &daemon{d, l, layout.Root{Path: c.Root}}
	t.Cleanup(func() { stop(t, s) })
	return s
}

func stop(t *testing.T, s *daemon) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// boot starts a daemon, on a kernel that was booted anew unless same.
func (m *machine) boot(same bool) *daemon {
	m.Helper()
	if !same {
		m.boots++
	}
	cfg := DaemonConfig{
		Root: m.root, ContentRoot: m.Content, BootID: fmt.Sprint("boot-", m.boots), NoBackground: true,
		OnDamaged: func(e *DamagedError) { m.damaged <- e },
		OnReady:   func(e storage.CommitEntry) { m.ready <- e },
	}
	if m.config != nil {
		m.config(&cfg)
	}
	return start(m.T, cfg)
}

// quiet sends the log nowhere.
func quiet(t *testing.T) {
	out := log.L.Logger.Out
	log.L.Logger.SetOutput(io.Discard)
	t.Cleanup(func() { log.L.Logger.SetOutput(out) })
}

// onRecord is what the journal has on the layers, and the daemon knows better.
func onRecord(t *testing.T, s *daemon) (r recorded.Layers) {
	t.Helper()
	treetest.Check(t, s.layers.gate.View(t.Context(), func(_ context.Context, j *storage.Journal) (err error) {
		r, err = recorded.Read(j, s.layers.recorder.bootID)
		return err
	}))
	s.layers.Update(r.Results, r.Entries)
	return r
}

// prepareWhenReady prepares, and does so again as long as the parent is being verified
// or healed: Prepare waits for a second at most.
func prepareWhenReady(t *testing.T, s *daemon, key, parent string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		_, err := s.Prepare(t.Context(), key, parent)
		if err == nil {
			return
		}
		if !errdefs.IsUnavailable(err) || time.Now().After(deadline) {
			t.Errorf("prepare %s: %v", key, err)
			return
		}
	}
}

// crash ends a daemon without its last words.
func crash(t *testing.T, s *daemon) {
	t.Helper()
	s.layers.closing.Do(func() {})
	stop(t, s)
}

func (m *machine) tree(s *daemon, i int) string {
	s.layers.table.mu.Lock()
	defer s.layers.table.mu.Unlock()
	return s.root.Tree(s.layers.table.layers[m.name(i)].entry.ID)
}

func (m *machine) state(s *daemon, i int) storage.State {
	s.layers.table.mu.Lock()
	defer s.layers.table.mu.Unlock()
	return s.layers.table.layers[m.name(i)].state.State
}

// wantStates compares the states of the layers with the words.
func (m *machine) wantStates(s *daemon, when string, want ...storage.State) {
	m.Helper()
	for i, w := range want {
		if have := m.state(s, i); have != w {
			m.Errorf("%s: layer %d is %s, want %s", when, i, have, w)
		}
	}
}

// wantWhole looks at all layers, also at their seals.
func (m *machine) wantWhole(s *daemon) {
	m.Helper()
	for _, e := range onRecord(m.T, s).Entries {
		r, err := verify.Layer(m.Context(), m.root, e, verify.Options{})
		if err != nil || r.State != storage.StateReady {
			m.Errorf("%s: %+v, %v", e.Name, r, err)
		}
	}
}

func (m *machine) layer(s *daemon, i int) *layer {
	s.layers.table.mu.Lock()
	defer s.layers.table.mu.Unlock()
	return s.layers.table.layers[m.name(i)]
}

func (m *machine) entry(s *daemon, i int) storage.CommitEntry {
	_, e := s.layers.table.current(m.layer(s, i))
	return e
}

func (m *machine) repair(s *daemon, o RepairOptions) []RepairResult {
	m.Helper()
	results, err := s.layers.Repair(m.Context(), o)
	if err != nil {
		m.Fatal(err)
	}
	return results
}

func (m *machine) wantRefused(s *daemon, when string, i int) {
	m.Helper()
	if _, err := s.Stat(m.Context(), m.name(i)); err == nil {
		m.Errorf("%s: layer %d is reported as whole", when, i)
	}
}

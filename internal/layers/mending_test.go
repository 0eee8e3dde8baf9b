package layers

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/scrub"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
	"github.com/durable-snapshotter/durable-snapshotter/internal/unpack"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// TestDebtSurvivesRestart: a caller was refused, the daemon is killed before the
// layer is healed, and the next one reports it when it is ready, until containerd
// has been notified.
func TestDebtSurvivesRestart(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	blob, err := os.ReadFile(m.Blob(m.Blobs[0]))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(m.Blob(m.Blobs[0])), os.Remove(filepath.Join(m.tree(s, 0), "link"))); err != nil {
		t.Fatal(err)
	}
	crash(t, s)
	s = m.boot(false)
	m.wantRefused(s, "damaged", 0)
	for deadline := time.Now().Add(time.Minute); !journalState(t, s, m.entry(s, 0).ID).Reported; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the refusal is not in the journal")
		}
	}
	crash(t, s)
	if err := os.WriteFile(m.Blob(m.Blobs[0]), blob, 0o644); err != nil {
		t.Fatal(err)
	}
	m.config = func(c *DaemonConfig) { c.NoBackground = false }
	for range 2 { // the first one dies before containerd was notified
		s = m.boot(true)
		select {
		case e := <-m.ready:
			if e.ChainID != m.ChainIDs[0] {
				t.Errorf("reported %v", e)
			}
		case <-time.After(time.Minute):
			t.Fatal("not reported")
		}
		if err := s.layers.recorder.flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		crash(t, s)
	}
	s = m.boot(true)
	<-m.ready
	s.layers.Announced("k8s.io", m.ChainIDs[0])
	stop(t, s)
	s = m.boot(true)
	if journalState(t, s, m.entry(s, 0).ID).Reported {
		t.Error("reported again after containerd was notified")
	}
}

func journalState(t *testing.T, s *daemon, id uint64) (state storage.StateEntry) {
	t.Helper()
	if err := s.layers.gate.View(t.Context(), func(_ context.Context, j *storage.Journal) (err error) {
		if state, err = j.GetState(id); errors.Is(err, storage.ErrNoEntry) {
			err = nil
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return state
}

// TestRemovedWhileItWaits: a layer that is removed while it waits for its
// verification is not damaged, and nothing is dropped for it.
func TestRemovedWhileItWaits(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	crash(t, s)
	s = m.boot(false)
	release := s.holdVerifications()
	if err := os.Remove(m.Blob(m.Blobs[0])); err != nil {
		t.Fatal(err)
	}
	l := m.layer(s, 0)
	asked := make(chan error)
	go func() { _, err := s.Stat(t.Context(), m.name(0)); asked <- err }()
	for {
		s.layers.table.mu.Lock()
		waits := l.work != nil
		s.layers.table.mu.Unlock()
		if waits {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err := errors.Join(s.Remove(t.Context(), m.name(0)), s.Cleanup(t.Context())); err != nil {
		t.Fatal(err)
	}
	release()
	<-asked
	select {
	case e := <-m.damaged:
		t.Errorf("reported: %v", e)
	default:
	}
	s.layers.table.mu.Lock()
	defer s.layers.table.mu.Unlock()
	if l.state.State == storage.StateDamaged || len(s.layers.table.pending) > 0 {
		t.Errorf("a removed layer is %s; to be written: %v", l.state.State, s.layers.table.pending)
	}
}

// TestNoCleanStopOverUnsavedFindings: when what was found cannot be written, the
// next boot verifies all layers.
func TestNoCleanStopOverUnsavedFindings(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	l := m.layer(s, 0)
	s.layers.table.mu.Lock()
	l.state.State, l.state.Tree = storage.StateDamaged, l.entry.Digest
	// A name that no encoder takes is as good as a disk that takes no write.
	bad := l.state
	bad.Checked = time.Date(20_000, 1, 1, 0, 0, 0, 0, time.UTC)
	s.layers.table.pending[l.entry.ID] = bad
	s.layers.table.mu.Unlock()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = m.boot(false)
	m.wantStates(s, "next boot", "unverified")
}

// TestOneBadLayerStopsNothing: a layer without chain ID and without digests, and
// one that cannot be digested, are reported, and the others are dealt with.
func TestOneBadLayerStopsNothing(t *testing.T) {
	m := newMachine(t, 2)
	s := m.boot(false)
	mounts, err := s.Prepare(t.Context(), "default/1/work", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(treetest.UpperDir(mounts), "f"), []byte("built"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), "default/2/made-by-a-builder", "default/1/work"); err != nil {
		t.Fatal(err)
	}
	m.pull(s)
	corrupt(t, filepath.Join(m.tree(s, 1), "dir/own1"))
	results := m.repair(s, RepairOptions{Deep: true})
	states := map[string]storage.State{}
	for _, r := range results {
		states[r.Name] = r.State
	}
	if states["default/2/made-by-a-builder"] != verify.NotComparable || states[m.name(1)] != storage.StateDamaged {
		t.Errorf("deep repair: %+v", results)
	}
	s.layers.cfg.Scrub = scrub.Config{Interval: time.Hour, Depth: storage.DepthContent}
	round := storage.Scrub{Depth: "content"}
	if err := s.layers.cfg.Scrub.Round(t.Context(), s.layers.gate, s.layers, &round); err != nil || round.Finished.IsZero() || round.Damaged != 1 {
		t.Errorf("deep scrub: %+v, %v", round, err)
	}
	if m.entry(s, 1).Strategy != storage.StrategyHealed {
		t.Error("the scrub did not heal what it found")
	}

	// The first one cannot be digested: a mount point of another kind is in its place.
	path := filepath.Join(s.root.Dir(m.entry(s, 0).ID), layout.ContentsFile+".new")
	if err := os.MkdirAll(filepath.Join(path, "in-the-way"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, l := range s.layers.digester.undigested() {
		if err := s.layers.digester.digest(t.Context(), l, l.entry); err != nil {
			l.digests.Failed(digestEvery, digestRarely)
		}
	}
	if m.layer(s, 1).state.Contents == "" || m.layer(s, 0).state.Contents != "" {
		t.Error("digests of the others were not taken")
	}
	for _, l := range s.layers.digester.undigested() {
		if l == m.layer(s, 0) {
			t.Error("the one that fails is read again at once")
		}
	}
}

// TestPanicEndsOneLayer: a panic in the work on a layer is its error, and is not
// repeated before the next start.
func TestPanicEndsOneLayer(t *testing.T) {
	m := newMachine(t, 2)
	s := m.boot(false)
	m.pull(s)
	if err := os.Remove(filepath.Join(m.tree(s, 1), "link")); err != nil {
		t.Fatal(err)
	}
	crash(t, s)
	s = m.boot(false)
	store := s.layers.healer.blobs
	s.layers.healer.blobs = nil // a healing panics
	for range 2 {
		m.wantRefused(s, "panic", 1)
	}
	if _, err := s.Stat(t.Context(), m.name(0)); err != nil {
		t.Errorf("the other layer: %v", err)
	}
	s.layers.healer.blobs = store
	m.wantRefused(s, "not tried again", 1)
	if results := m.repair(s, RepairOptions{Apply: true}); len(results) != 1 || !results[0].Healed {
		t.Errorf("an operator tries again: %+v", results)
	}
}

// TestHealingThatEndsTheDaemon is not tried for ever: a layer whose healing took
// several daemons with it waits for an operator.
func TestHealingThatEndsTheDaemon(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	if err := os.Remove(filepath.Join(m.tree(s, 0), "link")); err != nil {
		t.Fatal(err)
	}
	crash(t, s)
	s = m.boot(false)
	for i := range maxAttempts {
		// The daemon ends in the middle: the journal has the attempt, and not its end.
		l := m.layer(s, 0)
		s.layers.table.mu.Lock()
		l.state = storage.StateEntry{ID: l.entry.ID, State: storage.StateDamaged, Depth: storage.DepthMetadata, Tree: l.entry.Digest, Attempts: i + 1}
		s.layers.table.put(l, func(*storage.StateEntry) {})
		s.layers.table.mu.Unlock()
		if err := s.layers.recorder.flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		crash(t, s)
		s = m.boot(true)
	}
	before := m.entry(s, 0).Digest
	m.wantRefused(s, "after so many attempts", 0)
	if m.entry(s, 0).Digest != before {
		t.Error("tried again")
	}
	if e := <-m.damaged; e.NoBlob {
		t.Errorf("may be dropped: %v", e)
	}
	if results := m.repair(s, RepairOptions{Apply: true}); len(results) != 1 || !results[0].Healed {
		t.Errorf("an operator tries again: %+v", results)
	}
	if n := journalState(t, s, m.entry(s, 0).ID).Attempts; n != 0 {
		t.Errorf("%d attempts on record after a healing", n)
	}
}

// TestHealingLeavesRoom: a healing that would fill the disk is not begun, and the
// pause before the next attempt grows.
func TestHealingLeavesRoom(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	if err := os.Remove(filepath.Join(m.tree(s, 0), "link")); err != nil {
		t.Fatal(err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(m.root, &fs); err != nil {
		t.Fatal(err)
	}
	l := m.layer(s, 0)
	s.layers.table.mu.Lock()
	size := l.entry.Bytes
	l.entry.Bytes = int64(fs.Bavail) * int64(fs.Bsize)
	s.layers.table.mu.Unlock()
	if results := m.repair(s, RepairOptions{Apply: true}); len(results) != 1 || results[0].Healed || !strings.Contains(results[0].Reason, unpack.ErrNoRoom.Error()) {
		t.Fatalf("%+v", results)
	}
	if l.noBlob || len(m.damaged) != 1 || (<-m.damaged).NoBlob {
		t.Error("a full disk was taken for a missing blob")
	}
	if l.heals.Due() {
		t.Error("it is tried again at once")
	}
	s.layers.table.mu.Lock()
	l.entry.Bytes = size
	s.layers.table.mu.Unlock()
	if results := m.repair(s, RepairOptions{Apply: true}); len(results) != 1 || !results[0].Healed {
		t.Errorf("with room: %+v", results)
	}
}

// TestHealingSparesOthers: on a disk on which a layer does not fit a second time,
// attempts to heal it take nothing from what others write there.
func TestHealingSparesOthers(t *testing.T) {
	disk := t.TempDir()
	treetest.LoopDisk(t, disk, 96<<20)
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	content := bytes.Repeat([]byte("layer"), 6<<20)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: "large", Mode: 0o644, Size: int64(len(content)), ModTime: time.Unix(1_600_000_000, 0)}), writeAll(w, content), w.Close()); err != nil {
		t.Fatal(err)
	}
	m := newMachineOf(t, [][]byte{layer.Bytes()})
	m.root = filepath.Join(disk, "root")
	s := m.boot(false)
	m.pull(s)
	if err := errors.Join(os.WriteFile(filepath.Join(disk, "fill"), bytes.Repeat([]byte("x"), 36<<20), 0o600), os.Truncate(filepath.Join(m.tree(s, 0), "large"), 0)); err != nil {
		t.Fatal(err)
	}
	// The truncated file has given its room back, and another takes it.
	if err := os.WriteFile(filepath.Join(disk, "more"), bytes.Repeat([]byte("x"), 20<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	ended, failed := make(chan bool), make(chan int)
	go func() { // a container beside it
		n := 0
		for i := 0; ; i++ {
			select {
			case <-ended:
				failed <- n
				return
			default:
			}
			if err := os.WriteFile(filepath.Join(disk, "beside"), bytes.Repeat([]byte{byte(i)}, 8<<20), 0o600); err != nil {
				n++
			}
		}
	}()
	for range 5 {
		if results := m.repair(s, RepairOptions{Apply: true}); len(results) != 1 || results[0].Healed {
			t.Errorf("healed without room: %+v", results)
		}
	}
	close(ended)
	if n := <-failed; n > 0 {
		t.Errorf("%d writes of others failed", n)
	}
	if err := errors.Join(os.Remove(filepath.Join(disk, "fill")), os.Remove(filepath.Join(disk, "more"))); err != nil {
		t.Fatal(err)
	}
	if results := m.repair(s, RepairOptions{Apply: true}); len(results) != 1 || !results[0].Healed {
		t.Errorf("with room: %+v", results)
	}
	stop(t, s)
}

func writeAll(w io.Writer, p []byte) error {
	_, err := w.Write(p)
	return err
}

// TestFindingsFitIntoTheJournal: long values do not keep states out of it.
func TestFindingsFitIntoTheJournal(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	link := filepath.Join(m.tree(s, 0), "link")
	if err := errors.Join(os.Remove(link), os.Symlink(strings.Repeat("x", 3000), link)); err != nil {
		t.Fatal(err)
	}
	c, err := verify.Layer(t.Context(), m.root, m.entry(s, 0), verify.Options{})
	if err != nil || len(c.Findings) == 0 {
		t.Fatalf("%+v, %v", c, err)
	}
	for _, f := range c.Findings {
		if len(f.Have) > 256+len("…") {
			t.Errorf("a value of %d bytes", len(f.Have))
		}
	}
}

package layers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/contents"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// TestBootsAndStates: what is known of layers survives a restart, a crash of the
// daemon, and a clean stop with a boot after it; not a boot without one.
func TestBootsAndStates(t *testing.T) {
	m := newMachine(t, 3)
	s := m.boot(false)
	m.pull(s)
	m.wantStates(s, "committed", "ready", "ready", "ready")
	crash(t, s)
	s = m.boot(true)
	m.wantStates(s, "killed in the same boot", "ready", "ready", "ready")
	stop(t, s)
	s = m.boot(false)
	m.wantStates(s, "clean stop, boot", "ready", "ready", "ready")
	crash(t, s)
	s = m.boot(false)
	m.wantStates(s, "unclean shutdown", "unverified", "unverified", "unverified")

	// The question about the second layer is one about the first, too.
	info, err := s.Stat(t.Context(), m.name(1))
	if err != nil {
		t.Fatal(err)
	}
	if info.Labels[labelState] != "ready" || info.Labels[labelStrategy] != string(storage.StrategySyncfs) || info.Labels[labelSealed] == "" {
		t.Errorf("labels %v", info.Labels)
	}
	m.wantStates(s, "asked", "ready", "ready", "unverified")
	stop(t, s)
	s = m.boot(true)
	m.wantStates(s, "restarted before it had looked at all", "ready", "ready", "unverified")
	prepareWhenReady(t, s, "container", m.name(2))
	m.wantStates(s, "used", "ready", "ready", "ready")
	crash(t, s)
	s = m.boot(false)
	if _, err := s.Mounts(t.Context(), "container"); err != nil {
		t.Fatal(err)
	}
	m.wantStates(s, "mounted", "ready", "ready", "ready")
}

// TestHeal damages layers and asks for the topmost one, in the same boot and
// after an unclean one.
func TestHeal(t *testing.T) {
	for _, boot := range []bool{false, true} {
		for name, c := range map[string]struct {
			damage func(m *machine, s *daemon) error
			same   bool // seen without a look
		}{
			"file removed": {damage: func(m *machine, s *daemon) error { return os.Remove(filepath.Join(m.tree(s, 1), "link")) }},
			"file emptied": {damage: func(m *machine, s *daemon) error { return os.Truncate(filepath.Join(m.tree(s, 2), "hard2"), 0) }},
			"all damaged": {damage: func(m *machine, s *daemon) error {
				return errors.Join(os.Remove(filepath.Join(m.tree(s, 0), "link")), os.Remove(filepath.Join(m.tree(s, 1), "link")), os.Remove(filepath.Join(m.tree(s, 2), "link")))
			}},
			"tree removed":  {func(m *machine, s *daemon) error { return os.RemoveAll(m.tree(s, 1)) }, true},
			"layer removed": {func(m *machine, s *daemon) error { return os.RemoveAll(filepath.Dir(m.tree(s, 0))) }, true},
			"a file instead": {func(m *machine, s *daemon) error {
				dir := filepath.Dir(m.tree(s, 2))
				return errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600))
			}, true},
			"tree a link": {func(m *machine, s *daemon) error {
				tree := m.tree(s, 1)
				return errors.Join(os.RemoveAll(tree), os.Symlink("/", tree))
			}, true},
			"all removed": {func(m *machine, s *daemon) error { return os.RemoveAll(s.root.Snapshots()) }, true},
			"seal removed": {damage: func(m *machine, s *daemon) error {
				return os.Remove(filepath.Join(filepath.Dir(m.tree(s, 1)), layout.SealFile))
			}},
			"nothing damaged": {damage: func(m *machine, s *daemon) error { return nil }},
		} {
			if !boot && !c.same {
				continue
			}
			t.Run(fmt.Sprintf("%s boot=%t", name, boot), func(t *testing.T) {
				m := newMachine(t, 3)
				s := m.boot(false)
				m.pull(s)
				before := onRecord(t, s)
				if err := c.damage(m, s); err != nil {
					t.Fatal(err)
				}
				if boot {
					crash(t, s)
					s = m.boot(false)
				}
				prepareWhenReady(t, s, "container", m.name(2))
				m.wantStates(s, "healed", "ready", "ready", "ready")
				m.wantWhole(s)
				for i, e := range onRecord(t, s).Entries {
					old := before.Entries[i]
					if e.ID != old.ID || e.Name != old.Name || e.Sequence != old.Sequence || e.Entries != old.Entries || e.Bytes != old.Bytes {
						t.Errorf("healed to another layer: %+v, was %+v", e, old)
					}
					if e.Strategy == storage.StrategyHealed {
						wantContents(t, s.root.Dir(e.ID), e.Digest)
					}
				}
				stop(t, s)
				s = m.boot(false)
				m.wantStates(s, "after a clean boot", "ready", "ready", "ready")
				if left, err := filepath.Glob(filepath.Join(m.root, "replaced", "*")); err != nil || len(left) > 0 {
					t.Errorf("kept over a boot: %v, %v", left, err)
				}
			})
		}
	}
}

// wantContents verifies that a healed layer has the digests of its content: the blob went by,
// and nothing is read again for them.
func wantContents(t *testing.T, dir, tree string) {
	t.Helper()
	kept, ok := keptContents(dir, tree)
	read, err := contents.Write(t.Context(), filepath.Join(dir, "fs"), filepath.Join(t.TempDir(), "read"), contents.Reading{})
	if err != nil || !ok || kept != read {
		t.Errorf("%s: content digests %q, %t; its files have %q, %v", dir, kept, ok, read, err)
	}
}

// TestHealLooksBelow: the question is about one layer, of which the parents are
// known to be ready, and are not.
func TestHealLooksBelow(t *testing.T) {
	m := newMachine(t, 3)
	s := m.boot(false)
	m.pull(s)
	if err := os.RemoveAll(s.root.Snapshots()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Stat(t.Context(), m.name(2)); err != nil {
		t.Fatal(err)
	}
	m.wantWhole(s)
}

// TestHealKeepsWhatMountsUse: a healing after one that failed late finds the
// damaged tree where it builds, and does not delete it.
func TestHealKeepsWhatMountsUse(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	if err := os.Remove(filepath.Join(m.tree(s, 0), "link")); err != nil {
		t.Fatal(err)
	}
	late := s.root.HealingPlace(onRecord(t, s).Entries[0].ID, s.layers.recorder.bootID)
	if err := os.MkdirAll(late, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(late, "in-use"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.layers.Repair(t.Context(), RepairOptions{Apply: true}); err != nil {
		t.Fatal(err)
	}
	m.wantWhole(s)
	if kept, err := filepath.Glob(filepath.Join(s.root.Replaced(), "*", "in-use")); err != nil || len(kept) != 1 {
		t.Errorf("kept %v, %v", kept, err)
	}
}

// TestNeverSealed: a layer of the built-in snapshotter is taken as it is, until
// an operator names it to repair.
func TestNeverSealed(t *testing.T) {
	m := newMachine(t, 1)
	builtin, err := overlay.NewSnapshotter(m.root)
	if err != nil {
		t.Fatal(err)
	}
	m.Extract(t, builtin, 0, "key", "")
	treetest.Check(t, builtin.Commit(t.Context(), m.ChainIDs[0], "key"))
	if err := builtin.Close(); err != nil {
		t.Fatal(err)
	}
	s := m.boot(false)
	name := m.ChainIDs[0]
	info, err := s.Stat(t.Context(), name)
	if err != nil || info.Labels[labelState] != "unverified" {
		t.Fatalf("%+v, %v", info, err)
	}
	if e := onRecord(t, s).Entries[0]; e.ChainID != name {
		t.Errorf("reported without its chain ID, by which people name it: %+v", e)
	}
	if results, err := s.layers.Repair(t.Context(), RepairOptions{Apply: true}); err != nil || len(results) != 1 || results[0].Healed {
		t.Errorf("not named: %+v, %v", results, err)
	}
	results, err := s.layers.Repair(t.Context(), RepairOptions{Apply: true, IDs: []uint64{results(t, s)[0].ID}})
	if err != nil || len(results) != 1 || !results[0].Healed {
		t.Fatalf("named: %+v, %v", results, err)
	}
	m.wantWhole(s)
	if e := onRecord(t, s).Entries[0]; e.Strategy != storage.StrategyHealed || e.Digest == "" {
		t.Errorf("journal %+v", e)
	}
}

func results(t *testing.T, s *daemon) []verify.Result {
	t.Helper()
	return onRecord(t, s).Results
}

// TestNotHealed: without its blob a damaged layer is refused, everything that
// says what exists goes on, and the blob heals it when it comes back.
func TestNotHealed(t *testing.T) {
	for name, hide := range map[string]func(path string) error{
		"missing":   os.Remove,
		"truncated": func(path string) error { return os.Truncate(path, 100) },
		"flipped": func(path string) error {
			p, err := os.ReadFile(path)
			p[len(p)/2] ^= 1
			return errors.Join(err, os.WriteFile(path, p, 0o644))
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, 3)
			s := m.boot(false)
			m.pull(s)
			blob := m.Blob(m.Blobs[1])
			saved, err := os.ReadFile(blob)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(hide(blob), os.RemoveAll(m.tree(s, 1))); err != nil {
				t.Fatal(err)
			}
			refused := func(what string, err error) {
				t.Helper()
				var damaged *DamagedError
				if !errors.As(err, &damaged) || damaged.ChainID != m.ChainIDs[1] || damaged.Reason == "" || !errdefs.IsFailedPrecondition(err) {
					t.Errorf("%s: %v", what, err)
				}
			}
			for range 2 { // the second in the same boot, with a daemon that only read of it
				_, err = s.Prepare(t.Context(), "container", m.name(2))
				refused("prepare", err)
				_, err = s.View(t.Context(), "view", m.name(1))
				refused("view", err)
				_, err = s.Stat(t.Context(), m.name(2))
				refused("stat", err)
				if _, err := s.Stat(t.Context(), m.name(0)); err != nil {
					t.Errorf("the layer below: %v", err)
				}
				walked := 0
				if err := s.Walk(t.Context(), func(context.Context, snapshots.Info) error { walked++; return nil }); err != nil || walked != 3 {
					t.Errorf("walk: %d, %v", walked, err)
				}
				if _, err := s.Usage(t.Context(), m.name(1)); err != nil {
					t.Errorf("usage: %v", err)
				}
				if told := <-m.damaged; told.ChainID != m.ChainIDs[1] {
					t.Errorf("told of %v", told)
				}
				crash(t, s)
				s = m.boot(true)
				m.wantStates(s, "restarted", "ready", "damaged", "ready")
			}
			if err := os.WriteFile(blob, saved, 0o644); err != nil {
				t.Fatal(err)
			}
			prepareWhenReady(t, s, "container", m.name(2)) // with its blob again
			if err := errors.Join(s.Remove(t.Context(), "container"), s.Remove(t.Context(), m.name(2))); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestManyAsk: one look and one healing serve everybody who asks.
func TestManyAsk(t *testing.T) {
	m := newMachine(t, 3)
	s := m.boot(false)
	m.pull(s)
	if err := os.Remove(filepath.Join(m.tree(s, 0), "link")); err != nil {
		t.Fatal(err)
	}
	crash(t, s)
	s = m.boot(false)
	var asking sync.WaitGroup
	for i := range 50 {
		asking.Go(func() {
			prepareWhenReady(t, s, fmt.Sprint("container", i), m.name(2))
		})
	}
	asking.Wait()
	if replaced, err := os.ReadDir(s.root.Replaced()); err != nil || len(replaced) != 1 {
		t.Errorf("healed %d times: %v", len(replaced), err)
	}
}

// TestWaitsForNextWork: the verification that a caller waits for ends, and another
// caller begins the healing before the first one wakes up. It waits for that, too.
func TestWaitsForNextWork(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	r, l := s.layers.table, m.layer(s, 0)
	verifying, healing := &work{done: make(chan struct{})}, &work{done: make(chan struct{})}
	r.mu.Lock()
	l.state.State, l.work = storage.StateUnverified, verifying
	r.mu.Unlock()
	answer := make(chan error, 1)
	go func() { answer <- s.layers.Wait(context.WithoutCancel(t.Context()), m.name(0), true) }()
	for { // until it waits
		time.Sleep(10 * time.Millisecond)
		if r.mu.TryLock() {
			break
		}
	}
	l.state.State, l.work = storage.StateHealing, healing
	close(verifying.done)
	time.Sleep(10 * time.Millisecond) // it wakes up now
	r.mu.Unlock()
	select {
	case err := <-answer:
		t.Fatalf("answered while the layer is being healed: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	r.mu.Lock()
	l.state.State, l.work = storage.StateReady, nil
	close(healing.done)
	r.mu.Unlock()
	if err := <-answer; err != nil {
		t.Error(err)
	}
}

// TestAsksAgain: a verification that began before a caller asked could not be done. What
// hindered it may be gone, and the caller has one of its own. One that began later answers it.
func TestAsksAgain(t *testing.T) {
	for _, earlier := range []bool{true, false} {
		t.Run(fmt.Sprint("earlier=", earlier), func(t *testing.T) {
			m := newMachine(t, 1)
			s := m.boot(false)
			m.pull(s)
			r, l := s.layers.table, m.layer(s, 0)
			w := &work{done: make(chan struct{}), begun: time.Now()}
			if !earlier {
				w.begun = w.begun.Add(time.Hour)
			}
			r.mu.Lock()
			l.state.State, l.state.Reason, l.work = storage.StateUnverified, "too many open files", w
			r.mu.Unlock()
			answer := make(chan error, 1)
			go func() { answer <- s.layers.Wait(context.WithoutCancel(t.Context()), m.name(0), true) }()
			for s.layers.waiting.Load() == 0 {
				time.Sleep(time.Millisecond)
			}
			time.Sleep(10 * time.Millisecond) // it waits
			r.mu.Lock()
			l.work = nil
			close(w.done)
			r.mu.Unlock()
			err := <-answer
			if earlier && err != nil || !earlier && !errdefs.IsUnavailable(err) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// TestAskingEnds: a caller whose time is up gets an error, and the work goes on.
func TestAskingEnds(t *testing.T) {
	m := newMachine(t, 2)
	s := m.boot(false)
	m.pull(s)
	crash(t, s)
	s = m.boot(false)
	release := s.holdVerifications()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Stat(ctx, m.name(1)); !errdefs.IsUnavailable(err) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	release()
	if _, err := s.Stat(t.Context(), m.name(1)); err != nil {
		t.Error(err)
	}
}

// TestSideBySide: all layers of a chain that a caller waits for are verified at a time, and the
// background does not rest meanwhile.
func TestSideBySide(t *testing.T) {
	m := newMachine(t, 3)
	s := m.boot(false)
	m.pull(s)
	crash(t, s)
	s = m.boot(false)
	release := s.holdVerifications()
	asked := make(chan error)
	go func() { _, err := s.Stat(t.Context(), m.name(2)); asked <- err }()
	for begun := 0; begun < 3; time.Sleep(time.Millisecond) {
		begun = 0
		s.layers.table.mu.Lock()
		for i := range 3 {
			if s.layers.table.layers[m.name(i)].work != nil {
				begun++
			}
		}
		s.layers.table.mu.Unlock()
	}
	if n := s.layers.waiting.Load(); n != 1 {
		t.Errorf("%d callers wait", n)
	}
	release()
	if err := <-asked; err != nil {
		t.Error(err)
	}
	if n := s.layers.waiting.Load(); n != 0 {
		t.Errorf("%d callers wait still", n)
	}
}

// TestBackgroundAboveDamage: no caller waits, and what stands on a layer that stays
// damaged is looked at all the same.
func TestBackgroundAboveDamage(t *testing.T) {
	m := newMachine(t, 3)
	s := m.boot(false)
	m.pull(s)
	if err := errors.Join(os.Remove(filepath.Join(m.tree(s, 0), "link")), os.Remove(m.Blob(m.Blobs[0])), os.Remove(filepath.Join(m.tree(s, 2), "link"))); err != nil {
		t.Fatal(err)
	}
	crash(t, s)
	s = start(t, DaemonConfig{Root: m.root, ContentRoot: m.Content, BootID: "other"})
	for deadline := time.Now().Add(20 * time.Second); len(s.layers.table.in(storage.StateUnverified, storage.StateHealing)) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not all were looked at")
		}
	}
	// The topmost would inherit from the damaged one.
	m.wantStates(s, "looked at", "damaged", "ready", "damaged")
}

// TestBackground: no caller waits, and all layers are verified and healed.
func TestBackground(t *testing.T) {
	m := newMachine(t, 3)
	s := m.boot(false)
	m.pull(s)
	if err := os.Remove(filepath.Join(m.tree(s, 1), "link")); err != nil {
		t.Fatal(err)
	}
	crash(t, s)
	s = start(t, DaemonConfig{Root: m.root, ContentRoot: m.Content, BootID: "other"})
	for deadline := time.Now().Add(20 * time.Second); len(s.layers.table.in(storage.StateUnverified, storage.StateDamaged, storage.StateHealing)) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not all are ready")
		}
	}
	m.wantWhole(s)
}

// TestBackgroundTreeGone: a layer lost its tree while no daemon ran. The directory around
// it is there, so the start does not see it; no caller does, and it is healed.
func TestBackgroundTreeGone(t *testing.T) {
	m := newMachine(t, 3)
	s := m.boot(false)
	m.pull(s)
	crash(t, s)
	treetest.Check(t, os.RemoveAll(m.tree(s, 1)))
	s = start(t, DaemonConfig{Root: m.root, ContentRoot: m.Content, BootID: fmt.Sprint("boot-", m.boots)})
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if _, gone := verify.Root(m.tree(s, 1)); !gone && len(s.layers.table.in(storage.StateDamaged, storage.StateHealing)) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("not found")
		}
	}
	m.wantWhole(s)
}

// TestNothingIsDroppedBeforeAllIsExamined: the trees of all layers are gone at a start, and
// their blobs. The first one that a caller meets is not dropped: that is mass damage.
func TestNothingIsDroppedBeforeAllIsExamined(t *testing.T) {
	m := newMachine(t, 12)
	s := m.boot(false)
	m.pull(s)
	crash(t, s)
	for i := range 12 {
		treetest.Check(t, errors.Join(os.RemoveAll(m.tree(s, i)), os.Remove(m.Blob(m.Blobs[i]))))
	}
	s = m.boot(true)
	if err := s.layers.Wait(t.Context(), m.name(0), false); err == nil {
		t.Fatal("a layer without a tree and a blob is ready")
	}
	e := m.layer(s, 0).entry
	if err := s.layers.ConfirmDamaged(t.Context(), e.Namespace, e.ChainID); err == nil || !strings.Contains(err.Error(), "mending is stopped") {
		t.Errorf("its image may be dropped: %v", err)
	}
}

// TestPrepareDoesNotWait: a Prepare on a layer whose verification lasts is answered
// within seconds, as containerd holds its lock meanwhile; a Stat waits.
func TestPrepareDoesNotWait(t *testing.T) {
	m := newMachine(t, 2)
	s := m.boot(false)
	m.pull(s)
	crash(t, s)
	s = m.boot(false)
	release := s.holdVerifications()
	answered := make(chan error, 2)
	go func() {
		_, err := s.Prepare(t.Context(), "container", m.name(1))
		answered <- err
	}()
	go func() {
		_, err := s.View(t.Context(), "view", m.name(1))
		answered <- err
	}()
	stat := make(chan error, 1)
	go func() {
		_, err := s.Stat(t.Context(), m.name(1))
		stat <- err
	}()
	for range 2 {
		select {
		case err := <-answered:
			if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "try again") {
				t.Errorf("error %v", err)
			}
		case <-time.After(DefaultWait / 2):
			t.Fatal("Prepare waits until the layer is verified")
		}
	}
	select {
	case err := <-stat:
		t.Errorf("Stat did not wait: %v", err)
	default:
	}
	release()
	if err := <-stat; err != nil {
		t.Error(err)
	}
	if _, err := s.Prepare(t.Context(), "container", m.name(1)); err != nil {
		t.Error(err)
	}
}

// TestStopping: who waits for a layer is answered at once, and work that needs no
// waiting goes on.
func TestStopping(t *testing.T) {
	m := newMachine(t, 2)
	s := m.boot(false)
	m.pull(s)
	crash(t, s)
	s = m.boot(false) // an unclean shutdown: all are unverified
	s.holdVerifications()
	answers := make(chan error, 2)
	go func() { _, err := s.Stat(t.Context(), m.name(1)); answers <- err }()
	go func() { answers <- s.layers.ensureReady(t.Context(), m.name(0), false) }()
	time.Sleep(100 * time.Millisecond)
	began := time.Now()
	s.Stopping()
	s.Stopping()
	for range 2 {
		if err := <-answers; !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "the daemon is stopping") {
			t.Errorf("got %v", err)
		}
	}
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("answered after %v", took)
	}
	_, err := s.Prepare(t.Context(), "container", "")
	treetest.Check(t, err)
	treetest.Check(t, s.Commit(t.Context(), "layer", "container"))
	_, err = s.Prepare(t.Context(), "another", "layer")
	treetest.Check(t, err)
	treetest.Check(t, s.Remove(t.Context(), "another"))
}

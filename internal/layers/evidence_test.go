package layers

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/scrub"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// corrupt flips the first byte of a file and leaves its metadata as it was.
func corrupt(t *testing.T, path string) {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	_, err = f.ReadAt(b, 0)
	b[0] ^= 1
	_, werr := f.WriteAt(b, 0)
	if err := errors.Join(err, werr, f.Sync(), f.Close(), os.Chtimes(path, st.ModTime(), st.ModTime())); err != nil {
		t.Fatal(err)
	}
}

// digestAllNow takes the content digests that are due.
func (m *machine) digestAllNow(s *daemon) {
	m.Helper()
	for _, l := range s.layers.digester.undigested() {
		if err := s.layers.digester.digest(m.Context(), l, l.entry); err != nil {
			m.Fatal(err)
		}
	}
	if err := s.layers.recorder.flush(m.Context()); err != nil {
		m.Fatal(err)
	}
}

// TestShallowVerificationClearsNothing: damage of content that cannot be healed
// stays what is known, whatever verifies only metadata afterwards.
func TestShallowVerificationClearsNothing(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	m.digestAllNow(s)
	corrupt(t, filepath.Join(m.tree(s, 0), "dir/own0"))
	if err := os.Remove(m.Blob(m.Blobs[0])); err != nil {
		t.Fatal(err)
	}
	found := m.repair(s, RepairOptions{Deep: true, Apply: true})
	if len(found) != 1 || found[0].State != storage.StateDamaged || found[0].Depth != storage.DepthContent || !found[0].Deep.IsZero() {
		t.Fatalf("deep: %+v", found)
	}
	m.wantRefused(s, "found", 0)

	again := m.repair(s, RepairOptions{Apply: true})
	if len(again) != 1 || again[0].State != storage.StateDamaged || again[0].Healed {
		t.Errorf("repair of metadata: %+v", again)
	}
	m.wantRefused(s, "after a repair of metadata", 0)

	s.layers.cfg.Scrub = scrub.Config{Interval: time.Hour, Depth: storage.DepthMetadata}
	if err := s.layers.cfg.Scrub.Round(t.Context(), s.layers.gate, s.layers, &storage.Scrub{Depth: "metadata"}); err != nil {
		t.Fatal(err)
	}
	m.wantRefused(s, "after a scrub of metadata", 0)

	if r := onRecord(t, s).Results[0]; !r.Deep.IsZero() {
		t.Errorf("deep, when content was last found whole, is set: %+v", r)
	}
	for _, same := range []bool{true, false} {
		crash(t, s)
		s = m.boot(same)
		m.wantStates(s, "started again", "damaged")
		m.wantRefused(s, "started again", 0)
	}
	stop(t, s)
	offline, err := RepairRoot(t.Context(), DaemonConfig{Root: m.root, ContentRoot: m.Content}, RepairOptions{})
	if err != nil || len(offline) != 1 || offline[0].State != storage.StateDamaged {
		t.Errorf("plan without a daemon: %+v, %v", offline, err)
	}

	// An equally deep verification clears it.
	s = m.boot(true)
	corrupt(t, filepath.Join(m.tree(s, 0), "dir/own0")) // back to what it was
	if _, err := s.layers.Repair(t.Context(), RepairOptions{Deep: true, Apply: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Stat(t.Context(), m.name(0)); err != nil {
		t.Errorf("whole again, verified as deep: %v", err)
	}
}

// TestOrderOfVerifications: damage goes stale only with its tree; a result without
// damage counts only if its verification began later. No clock has a say.
func TestOrderOfVerifications(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	l := m.layer(s, 0)
	note := func(c verify.Result) bool {
		s.layers.table.mu.Lock()
		defer s.layers.table.mu.Unlock()
		return s.layers.table.note(t.Context(), l, c)
	}
	again := func() verify.Result {
		t.Helper()
		c, err := s.layers.verify(t.Context(), l, verify.Options{})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	before := again()
	link := filepath.Join(m.tree(s, 0), "link")
	if err := os.Rename(link, m.root+"/link"); err != nil {
		t.Fatal(err)
	}
	damage := again()
	// Another one ended meanwhile, and by its clock it is from the future.
	later := before
	later.Checked = time.Now().Add(100 * 365 * 24 * time.Hour)
	later.Order = damage.Order + 1
	note(later)
	s.layers.table.mu.Lock()
	l.state.Checked = later.Checked
	s.layers.table.mu.Unlock()
	if !note(damage) {
		t.Error("damage of the tree that is there was thrown away")
	}
	m.wantStates(s, "found", "damaged")
	if note(before) {
		t.Error("a verification that began before cleared the damage")
	}
	m.wantStates(s, "an older verification", "damaged")

	healed := m.repair(s, RepairOptions{Apply: true})
	if len(healed) != 1 || !healed[0].Healed {
		t.Fatalf("%+v", healed)
	}
	if note(damage) {
		t.Error("damage of a tree that was exchanged counts")
	}
	m.wantStates(s, "a result about the former tree", "ready")
	m.wantWhole(s)
}

// TestFutureStateIsRepaired: a state that was noted under a clock far ahead does
// not prevent that damage is found and healed, and healed means that a tree was
// exchanged.
func TestFutureStateIsRepaired(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	l := m.layer(s, 0)
	s.layers.table.mu.Lock()
	l.state.Checked = time.Now().Add(72 * 365 * 24 * time.Hour)
	s.layers.table.put(l, func(*storage.StateEntry) {})
	s.layers.table.mu.Unlock()
	stop(t, s)
	s = m.boot(true)
	if err := os.Remove(filepath.Join(m.tree(s, 0), "link")); err != nil {
		t.Fatal(err)
	}
	before := m.entry(s, 0).Digest
	results := m.repair(s, RepairOptions{Apply: true})
	if len(results) != 1 || !results[0].Healed || m.entry(s, 0).Digest == before {
		t.Errorf("%+v", results)
	}
	m.wantWhole(s)
}

// TestSecondVerification: what was wrong when it was found, and is not any more
// when it is to be mended, is neither replaced nor reported for dropping, with and
// without a blob.
func TestSecondVerification(t *testing.T) {
	for _, blob := range []bool{true, false} {
		t.Run(fmt.Sprint("blob=", blob), func(t *testing.T) {
			m := newMachine(t, 2)
			s := m.boot(false)
			m.pull(s)
			if !blob {
				if err := os.Remove(m.Blob(m.Blobs[1])); err != nil {
					t.Fatal(err)
				}
			}
			before := m.entry(s, 1)
			tree := m.tree(s, 1)
			s.layers.healing <- struct{}{} // the healing waits
			if err := os.Rename(tree, tree+"-away"); err != nil {
				t.Fatal(err)
			}
			asked := make(chan error)
			go func() { _, err := s.Stat(t.Context(), m.name(1)); asked <- err }()
			for deadline := time.Now().Add(time.Minute); m.state(s, 1) != storage.StateDamaged; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("not found")
				}
			}
			if err := os.Rename(tree+"-away", tree); err != nil {
				t.Fatal(err)
			}
			<-s.layers.healing
			if err := <-asked; err != nil {
				t.Errorf("whole again: %v", err)
			}
			if now := m.entry(s, 1); now.Digest != before.Digest {
				t.Error("the tree was replaced")
			}
			select {
			case e := <-m.damaged:
				t.Errorf("reported for dropping: %v", e)
			default:
			}
			m.wantStates(s, "back", "ready", "ready")
		})
	}
}

// TestTransientDamageIsForgotten: a finding of an earlier boot or daemon is verified
// again before anything else.
func TestTransientDamageIsForgotten(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	if err := os.Remove(m.Blob(m.Blobs[0])); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(m.tree(s, 0), "link")
	if err := os.Rename(link, m.root+"/away"); err != nil {
		t.Fatal(err)
	}
	crash(t, s)
	s = m.boot(false)
	m.wantRefused(s, "damaged", 0)
	<-m.damaged
	crash(t, s)
	if err := os.Rename(m.root+"/away", link); err != nil {
		t.Fatal(err)
	}
	s = m.boot(true)
	// The renames have moved the time of the directory.
	setTimesBySeal(t, m, s, 0)
	if err := s.layers.ConfirmDamaged(t.Context(), "k8s.io", m.ChainIDs[0]); err == nil {
		t.Error("a layer that is whole may be dropped")
	}
	if _, err := s.Stat(t.Context(), m.name(0)); err != nil {
		t.Errorf("whole again: %v", err)
	}
}

// setTimesBySeal puts the time of a layer's root back to what its seal has.
func setTimesBySeal(t *testing.T, m *machine, s *daemon, i int) {
	t.Helper()
	c, err := verify.Layer(t.Context(), m.root, m.entry(s, i), verify.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range c.Findings {
		if f.What != "time" {
			t.Fatalf("more than a time: %v", f)
		}
		var sec, nsec int64
		if _, err := fmt.Sscanf(f.Want, "%d.%d", &sec, &nsec); err != nil {
			t.Fatal(err)
		}
		at := time.Unix(sec, nsec)
		if err := os.Chtimes(filepath.Join(m.tree(s, i), f.Path), at, at); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCannotLookIsNoDamage: a full table of descriptors says nothing about a layer.
func TestCannotLookIsNoDamage(t *testing.T) {
	m := newMachine(t, 2)
	s := m.boot(false)
	m.pull(s)
	crash(t, s)
	s = m.boot(false)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	open := openFiles(t)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: open, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	var failed []error
	for i := range 2 {
		_, err := s.Stat(t.Context(), m.name(i))
		failed = append(failed, err)
	}
	// The answer about the lower layer does not wait for the look at the upper one.
	for i := range 2 {
		for r, l := s.layers.table, m.layer(s, i); ; time.Sleep(time.Millisecond) {
			r.mu.Lock()
			w := l.work
			r.mu.Unlock()
			if w == nil {
				break
			}
		}
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	for i, err := range failed {
		if err == nil || errors.As(err, new(*DamagedError)) {
			t.Errorf("layer %d: %v", i, err)
		}
	}
	m.wantStates(s, "cannot be verified", "unverified", "unverified")
	select {
	case e := <-m.damaged:
		t.Errorf("reported as damaged: %v", e)
	default:
	}
	if _, err := s.Stat(t.Context(), m.name(1)); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// openFiles is the lowest limit under which nothing more can be opened.
func openFiles(t *testing.T) uint64 {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	highest := 0
	for _, fd := range fds {
		var n int
		if _, err := fmt.Sscan(fd.Name(), &n); err == nil {
			highest = max(highest, n)
		}
	}
	// Fill the gaps, or the next open takes one of them.
	for {
		f, err := os.Open("/dev/null")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if int(f.Fd()) >= highest {
			return uint64(f.Fd()) + 1
		}
	}
}

// TestDigestsOfRebuiltLayers: a rebuild does not make what is on disk the truth. It
// keeps content digests that are there, and no others are taken.
func TestDigestsOfRebuiltLayers(t *testing.T) {
	for _, recorded := range []bool{true, false} { // false: by a record of an older version
		t.Run(fmt.Sprint("recorded=", recorded), func(t *testing.T) {
			m := newMachine(t, 2)
			s := m.boot(false)
			m.pull(s)
			l := m.layer(s, 0)
			if err := s.layers.digester.digest(t.Context(), l, l.entry); err != nil { // of the first only
				t.Fatal(err)
			}
			tree0, tree1, dir := m.tree(s, 0), m.tree(s, 1), filepath.Dir(m.tree(s, 0))
			stop(t, s)
			if !recorded {
				r, err := layout.ReadRecord(dir)
				if err != nil {
					t.Fatal(err)
				}
				r.Contents = ""
				if err := layout.ReplaceRecordSync(dir, r); err != nil {
					t.Fatal(err)
				}
			}
			corrupt(t, filepath.Join(tree0, "dir/own0"))
			corrupt(t, filepath.Join(tree1, "dir/own1"))
			if err := os.Remove(filepath.Join(m.root, "metadata.db")); err != nil {
				t.Fatal(err)
			}
			if n, err := Rebuild(t.Context(), m.root); err != nil || n != 2 {
				t.Fatalf("%d layers, %v", n, err)
			}
			// The rebuild notes the boot of the kernel, so it must be that of the daemon.
			kernel, err := layout.BootID()
			if err != nil {
				t.Fatal(err)
			}
			m.config = func(c *DaemonConfig) { c.BootID = kernel }
			s = m.boot(true)
			if _, err := s.Stat(t.Context(), m.name(1)); err != nil {
				t.Fatal(err)
			}
			if left := s.layers.digester.undigested(); len(left) != 0 {
				t.Errorf("digests would be taken of what is there: %d layers", len(left))
			}
			for i := range 2 {
				found := m.repair(s, RepairOptions{Deep: true, IDs: []uint64{m.entry(s, i).ID}})
				if len(found) != 1 || found[0].State != storage.StateDamaged {
					t.Errorf("layer %d after the rebuild: %+v", i, found)
				}
			}
			// Without its blob, only the digests that were kept can tell.
			if err := os.Remove(m.Blob(m.Blobs[0])); err != nil {
				t.Fatal(err)
			}
			if found := m.repair(s, RepairOptions{Deep: true, IDs: []uint64{m.entry(s, 0).ID}}); len(found) != 1 || found[0].State != storage.StateDamaged {
				t.Errorf("by the digests that were kept: %+v", found)
			}
		})
	}
}

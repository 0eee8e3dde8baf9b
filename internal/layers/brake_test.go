package layers

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// wide has many layers of one image, each on the one before.
func wide(t *testing.T, layers int) (*machine, *daemon) {
	m := newMachine(t, layers)
	s := m.boot(false)
	m.pull(s)
	return m, s
}

// TestBrakeOnAlteredLayers: a tool that changed an attribute of all layers does not
// make the node extract them all, nor drop their images; an operator decides.
func TestBrakeOnAlteredLayers(t *testing.T) {
	for _, blobs := range []bool{true, false} {
		t.Run(fmt.Sprint("blobs=", blobs), func(t *testing.T) {
			m, s := wide(t, 8)
			var before []string
			for i := range 8 {
				before = append(before, m.entry(s, i).Digest)
				if err := os.Chmod(filepath.Join(m.tree(s, i), "opaque"), 0o700); err != nil {
					t.Fatal(err)
				}
				if !blobs {
					if err := os.Remove(m.Blob(m.Blobs[i])); err != nil {
						t.Fatal(err)
					}
				}
			}
			var reasons []string
			m.config = func(c *DaemonConfig) {
				c.NoBackground = false
				c.OnBrake = func(reason string) { reasons = append(reasons, reason) }
			}
			crash(t, s)
			s = m.boot(false)
			for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
				if s.layers.Brake() != "" {
					break
				}
				if time.Now().After(deadline) {
					t.Fatal("mending was not stopped")
				}
			}
			for i := range 8 {
				_, _ = s.Stat(t.Context(), m.name(i)) // asks for it
			}
			replaced := 0
			for i := range 8 {
				if m.entry(s, i).Digest != before[i] {
					replaced++
				}
			}
			if replaced >= 5 {
				t.Errorf("%d trees were replaced", replaced)
			}
			for len(m.damaged) > 0 {
				if e := <-m.damaged; e.NoBlob {
					t.Errorf("reported for dropping: %v", e)
				}
			}
			if err := s.layers.ConfirmDamaged(t.Context(), "k8s.io", m.ChainIDs[7]); err == nil || !strings.Contains(err.Error(), "mending is stopped") {
				t.Errorf("may be dropped: %v", err)
			}
			crash(t, s)
			m.config = func(c *DaemonConfig) { c.OnBrake = func(reason string) { reasons = append(reasons, reason) } }
			s = m.boot(true)
			if len(reasons) < 2 || reasons[0] == "" || reasons[len(reasons)-1] == "" {
				t.Errorf("OnBrake: %q", reasons)
			}

			results := m.repair(s, RepairOptions{Apply: true})
			if blobs {
				for _, r := range results {
					if !r.Healed {
						t.Errorf("%+v", r)
					}
				}
				m.wantWhole(s)
				if why := s.layers.Brake(); why != "" {
					t.Errorf("still stopped: %q", why)
				}
				return
			}
			dropped := 0
			for len(m.damaged) > 0 {
				if e := <-m.damaged; e.NoBlob {
					dropped++
				}
			}
			if dropped == 0 {
				t.Error("an operator has decided, and nothing is reported for dropping")
			}
		})
	}
}

// TestBrakeOnMassDamage: many layers that lost content are healed, and their images
// are not dropped.
func TestBrakeOnMassDamage(t *testing.T) {
	const layers = 14
	m, s := wide(t, layers)
	for i := range layers {
		if err := os.Truncate(filepath.Join(m.tree(s, i), fmt.Sprint("dir/own", i)), 0); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			continue // can be healed
		}
		if err := os.Remove(m.Blob(m.Blobs[i])); err != nil {
			t.Fatal(err)
		}
	}
	m.config = func(c *DaemonConfig) { c.NoBackground = false }
	crash(t, s)
	s = m.boot(false)
	for deadline := time.Now().Add(time.Minute); m.entry(s, 0).Strategy != storage.StrategyHealed; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the layer with a blob was not healed")
		}
	}
	_, _ = s.Stat(t.Context(), m.name(1))
	if s.layers.Brake() == "" {
		t.Error("mending was not stopped")
	}
	for len(m.damaged) > 0 {
		if e := <-m.damaged; e.NoBlob {
			t.Errorf("reported for dropping: %v", e)
		}
	}
}

// TestBrakeOnMissingMount: snapshots/ is an empty directory where a file system was
// mounted. Nothing is extracted into it, and nothing dropped.
func TestBrakeOnMissingMount(t *testing.T) {
	m := newMachine(t, 2)
	dir, source := filepath.Join(m.root, "snapshots"), t.TempDir()
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	mount := func() { treetest.Check(t, unix.Mount(source, dir, "", unix.MS_BIND, "")) }
	mount()
	s := m.boot(false)
	m.pull(s)
	crash(t, s)
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	for range 2 { // and it is not taken for the right one by the first start
		s = m.boot(false)
		m.wantRefused(s, "not mounted", 1)
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("extracted into the mount point: %v, %v", left, err)
		}
		crash(t, s)
	}
	for len(m.damaged) > 0 {
		if e := <-m.damaged; e.NoBlob {
			t.Errorf("reported for dropping: %v", e)
		}
	}
	mount()
	s = m.boot(false)
	if _, err := s.Stat(t.Context(), m.name(1)); err != nil {
		t.Errorf("mounted again: %v", err)
	}
	if why := s.layers.Brake(); why != "" {
		t.Errorf("still stopped: %q", why)
	}
	stop(t, s)
}

// TestNoBrakeOnRemovedSnapshots: snapshots/ was removed, and a daemon that had made
// it again died before it knew more. The layers are healed.
func TestNoBrakeOnRemovedSnapshots(t *testing.T) {
	m, s := wide(t, 2)
	crash(t, s)
	if err := errors.Join(os.RemoveAll(s.root.Snapshots()), os.Mkdir(s.root.Snapshots(), 0o700)); err != nil {
		t.Fatal(err)
	}
	s = m.boot(false)
	if _, err := s.Stat(t.Context(), m.name(1)); err != nil {
		t.Error(err)
	}
	m.wantWhole(s)
}

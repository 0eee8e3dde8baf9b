package snapshotter

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// TestStateIsNotALabel: a client that writes back the labels it was told does
// not store what was never its to say.
func TestStateIsNotALabel(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	info, err := s.Stat(t.Context(), m.name(0))
	if err != nil {
		t.Fatal(err)
	}
	info.Labels["mine"] = "yes"
	if _, err := s.Update(t.Context(), info); err != nil {
		t.Fatal(err)
	}
	r, err := s.Inspect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(r.Snapshots[0].Labels); got != "map[mine:yes]" {
		t.Errorf("stored labels %s", got)
	}
}

// TestRepair: a plan changes nothing, and what is applied is what was planned.
func TestRepair(t *testing.T) {
	m := newMachine(t, 2)
	s := m.boot(false)
	m.pull(s)
	if err := os.Remove(filepath.Join(m.tree(s, 1), "link")); err != nil {
		t.Fatal(err)
	}
	planned, err := s.layers.Repair(t.Context(), layers.RepairOptions{})
	if err != nil || len(planned) != 1 || planned[0].Blob != m.Blobs[1].String() || planned[0].Healed || planned[0].Findings[0].Path != "." && planned[0].Findings[0].Path != "link" {
		t.Fatalf("%+v, %v", planned, err)
	}
	m.wantStates(s, "planned", "ready", "ready")
	stop(t, s)
	cfg := Config{Root: m.root, ContentRoot: m.Content, BootID: "boot-1"}
	stopped, err := RepairRoot(t.Context(), cfg, layers.RepairOptions{})
	if err != nil || len(stopped) != 1 || stopped[0].Plan != planned[0].Plan {
		t.Fatalf("%+v, %v", stopped, err)
	}
	done, err := RepairRoot(t.Context(), cfg, layers.RepairOptions{Apply: true})
	if err != nil || len(done) != 1 || !done[0].Healed || done[0].State != storage.StateReady {
		t.Fatalf("%+v, %v", done, err)
	}
	s = m.boot(true)
	m.wantWhole(s)
	if nothing, err := s.layers.Repair(t.Context(), layers.RepairOptions{Deep: true}); err != nil || len(nothing) > 0 {
		t.Errorf("%+v, %v", nothing, err)
	}
}

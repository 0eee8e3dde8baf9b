package crash

import (
	"errors"
	"slices"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// TestBroken breaks the harness in every way it is known to break, and wants an
// error, because a broken harness finds nothing and would pass.
func TestBroken(t *testing.T) {
	b := theBench(t)
	whole := oursOn(t, disk.Ext4)
	if err := whole.Sound(); err != nil {
		t.Fatal(err)
	}
	for _, broken := range []struct {
		name string
		try  func() error
	}{
		{"a disk that gets no flush", func() error {
			_, err := lab.Record(t.Context(), lab.Setup{
				FS: disk.Ext4, Options: []string{"nobarrier"}, Seed: seed, Name: "nobarrier",
				Layers: workload.Size{Chains: 1, Layers: 1}, Daemon: b.Daemon(b.Ours, "nobarrier"),
			})
			return err
		}},
		{"a log at its limit", func() error {
			r := *whole
			r.Stats.Overflow = true
			return r.Sound()
		}},
		{"a commit without its mark", func() error {
			r := *whole
			r.Marks = slices.DeleteFunc(slices.Clone(r.Marks), func(m workload.Mark) bool {
				return m.Op == workload.Commit && m.Phase == workload.Ack && m.Name == r.Plan.Chains[0].Layers[0].Name
			})
			return r.Sound()
		}},
		{"a check of nothing", func() error {
			_, err := (&lab.Check{Recording: whole, Subject: inProcess}).Run(t.Context())
			return err
		}},
		{"a control that survives", func() error {
			safe := *b
			safe.Stock = "" // ours in the place of overlayfs
			_, err := safe.Control(t.Context(), disk.Ext4, seed)
			return err
		}},
	} {
		t.Run(broken.name, func(t *testing.T) {
			if err := broken.try(); !errors.Is(err, lab.ErrBroken) {
				t.Errorf("got %v, want %v", err, lab.ErrBroken)
			}
		})
	}
}

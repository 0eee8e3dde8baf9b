package crash

import (
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// TestParallelUnpack cuts the power while eight layers are unpacked side by
// side, and get their parents at Commit.
func TestParallelUnpack(t *testing.T) {
	t.Parallel()
	b := theBench(t)
	r, err := lab.Record(t.Context(), lab.Setup{
		FS: disk.Ext4, Seed: seed, Name: "ours-parallel", Parallel: true,
		Layers: workload.Size{Chains: 1, Layers: 8}, Daemon: b.Daemon(b.Ours, "parallel"),
	})
	if err != nil {
		t.Fatal(err)
	}
	check := lab.Check{
		Recording: r, Cases: lab.Some(state.Enumerate(r.Log, state.Options{From: r.Start, Seed: seed}), 60),
		Subject: inProcess, Sample: daemons(b, "boot-parallel"), Every: 50, Deep: 25, Strict: true,
	}
	tally, err := check.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	logTally(t, tally)
	if !tally.Clean() {
		t.Error("not everything survived")
	}
}

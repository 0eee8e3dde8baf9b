package crash

import (
	"fmt"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// ways are the two cheaper cuts, where they work.
var ways = []struct {
	fs  disk.FS
	way lab.Way
}{{disk.Ext4, lab.Shutdown}, {disk.XFS, lab.Shutdown}, {disk.Ext4, lab.Kill}, {disk.Btrfs, lab.Kill}}

// TestCut cuts the power the two cheaper ways, at random moments.
func TestCut(t *testing.T) {
	b := theBench(t)
	for _, w := range ways {
		who := fmt.Sprintf("cut-%s-%s", w.fs, w.way)
		t.Run(string(w.fs)+"/"+string(w.way), func(t *testing.T) {
			cut := lab.Cut{
				FS: w.fs, Way: w.way, Seed: seed, Times: 4, Layers: workload.Small, Name: "ours",
				Daemon: b.Daemon(b.Ours, who), Subject: b.Daemon(b.Ours, who), Strict: true,
			}
			tally, err := cut.Run(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			logTally(t, tally)
			if tally.Survived != cut.Times {
				t.Errorf("%d of %d survived", tally.Survived, cut.Times)
			}
		})
	}
}

// TestCutControl is the control of the first way. The second has none: the
// kernel goes on, so what was written stays, synced or not.
func TestCutControl(t *testing.T) {
	t.Parallel()
	b := theBench(t)
	for _, fs := range []disk.FS{disk.Ext4, disk.XFS} {
		t.Run(string(fs), func(t *testing.T) {
			t.Parallel()
			who := "cut-overlayfs-" + string(fs)
			cut := lab.Cut{
				FS: fs, Way: lab.Shutdown, Seed: seed, Times: 20, Layers: workload.Small, Name: "overlayfs",
				Daemon: b.StockDaemon(who), Subject: b.StockDaemon(who),
				Until: func(r lab.Result) bool { return oracle.Has(r.Findings, oracle.Lost) },
			}
			tally, err := cut.Run(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			logTally(t, tally)
			if tally.Lost == 0 {
				t.Error("nothing was lost")
			}
		})
	}
}

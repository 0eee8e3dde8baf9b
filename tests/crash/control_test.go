package crash

import (
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
)

// TestControl does to containerd's built-in overlayfs what is done to ours. By
// default it loses layers on every file system: a harness that does not see
// that sees nothing.
func TestControl(t *testing.T) {
	t.Parallel()
	b := theBench(t)
	for _, fs := range kinds {
		t.Run(string(fs), func(t *testing.T) {
			t.Parallel()
			c, err := b.Control(t.Context(), fs, seed)
			if err != nil {
				t.Fatal(err)
			}
			t.Log(c)
		})
	}
}

// TestControlWithSync is the other way round: with a sync at the end of each
// extraction, which is all that a layer needs before its row is written, the
// built-in overlayfs loses nothing and has no lies. A harness that reports some
// would find what is not there.
//
// It is not without flaws even then. Prepare is not durable there: the row of a
// container can be on disk without its directories. And a directory without a
// row is in the way of the next Prepare or View until a client calls Cleanup.
// Those are counted, not forbidden.
func TestControlWithSync(t *testing.T) {
	t.Parallel()
	b := theBench(t)
	for _, fs := range kinds {
		t.Run(string(fs), func(t *testing.T) {
			t.Parallel()
			tally, err := b.ControlWithSync(t.Context(), fs, seed, 24)
			if err != nil {
				t.Fatal(err)
			}
			logTally(t, tally)
			if tally.Lost != 0 || tally.Lies != 0 {
				t.Errorf("%d lost, %d lies", tally.Lost, tally.Lies)
			}
		})
	}
}

// TestControlGeneric loses layers of another of containerd's snapshotters, one
// that copies: the harness needs nothing but the API to see that.
func TestControlGeneric(t *testing.T) {
	t.Parallel()
	b := theBench(t)
	native := func(who string) oracle.Process {
		p := b.StockDaemon(who)
		p.Command = append(p.Command, "--snapshotter", "native")
		return p
	}
	r, err := lab.Record(t.Context(), lab.Setup{FS: disk.Ext4, Seed: seed, Name: "native", Generic: true, Daemon: native("native")})
	if err != nil {
		t.Fatal(err)
	}
	cases := state.Enumerate(r.Log, state.Options{From: r.Start, Seed: seed})
	check := lab.Check{
		Recording: r, Cases: lab.Some(cases, 100), Workers: 1,
		Subject: func(int) oracle.Subject { return native("boot-native") },
		Until:   func(r lab.Result) bool { return oracle.Has(r.Findings, oracle.Lost) },
	}
	tally, err := check.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	logTally(t, tally)
	if tally.Lost == 0 {
		t.Error("nothing was lost")
	}
}

package crash

import (
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestAPI cuts the power at every write of a workload on durable-snapshotter; on btrfs,
// which writes its trees block by block, at every third.
// No layer may be lost, none reported that is not whole, nothing else wrong.
// make test-crash does the same in as many states as there is time for.
func TestAPI(t *testing.T) {
	t.Parallel()
	b := theBench(t)
	for _, fs := range kinds {
		t.Run(string(fs), func(t *testing.T) {
			t.Parallel()
			want := map[disk.FS]int{disk.Ext4: 120, disk.XFS: 60, disk.Btrfs: 60}[fs]
			r := oursOn(t, fs)
			cases := state.Enumerate(r.Log, state.Options{From: r.Start, Seed: seed, Want: want})
			if !kittest.Every() {
				cases = lab.Some(cases, want)
			}
			check := lab.Check{
				Recording: r, Cases: cases,
				Subject: inProcess,
				// Every 25th examination is of the daemon itself, which is what
				// runs on a node; it costs ten times as much.
				Sample: daemons(b, "boot-"+string(fs)), Every: 25,
				Deep: 25, Nested: 40, Inner: 15, Strict: true,
			}
			tally, err := check.Run(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			logTally(t, tally)
			if first := tally.States - tally.Nested; first < want {
				t.Errorf("%d states of a first cut, want %d", first, want)
			}
			if tally.Nested == 0 {
				t.Error("no recovery was cut again")
			}
			if tally.Lost != 0 || tally.Lies != 0 || tally.Flawed != 0 {
				t.Errorf("%d lost, %d lies, %d flawed", tally.Lost, tally.Lies, tally.Flawed)
			}
			if unmeasured(tally) {
				t.Errorf("%d of %d states were not measured", tally.NotMeasured, tally.States)
			}
		})
	}
}

// TestGeneric does the same through nothing but the API and mounts, as it is
// done to a snapshotter whose directories are not known.
func TestGeneric(t *testing.T) {
	t.Parallel()
	b := theBench(t)
	r, err := lab.Record(t.Context(), lab.Setup{
		FS: disk.Ext4, Seed: seed, Name: "ours-generic", Generic: true, Daemon: b.Daemon(b.Ours, "generic"),
	})
	if err != nil {
		t.Fatal(err)
	}
	cases := state.Enumerate(r.Log, state.Options{From: r.Start, Seed: seed})
	check := lab.Check{Recording: r, Cases: lab.Some(cases, 20), Subject: daemons(b, "boot-generic"), Deep: 10}
	tally, err := check.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	logTally(t, tally)
	if !tally.Clean() {
		t.Error("not everything survived")
	}
}

package crash

import (
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestDiffer cuts the power while our diff service extracts layers, one after another, side
// by side, and with something written to each of them after that. The file system is not
// synced in Commit then, and on ext4 and xfs, in recordings of another kind, not in Apply
// either. make test takes half of the kinds on each file system; DURABLE_TEST_DIFFER_STATES
// has more states of each.
func TestDiffer(t *testing.T) {
	t.Parallel()
	b := theBench(t)
	for i, fs := range kinds {
		for j, s := range []lab.Setup{
			{Name: "differ", Layers: workload.Size{Chains: 2, Layers: 4}},
			{Name: "differ-parallel", Parallel: true, Layers: workload.Size{Chains: 1, Layers: 8}},
			{Name: "differ-late", Late: true, Layers: workload.Size{Chains: 1, Layers: 4}},
			{Name: "files", Layers: workload.Size{Chains: 2, Layers: 4}},
			{Name: "files-lazy", Lazy: true, Layers: workload.Size{Chains: 1, Layers: 4}},
			{Name: "files-parallel", Parallel: true, Layers: workload.Size{Chains: 1, Layers: 8}},
		} {
			alone := strings.HasPrefix(s.Name, "files")
			if alone && fs == disk.Btrfs {
				continue // always syncs the file system
			}
			if !kittest.Turn(i+j, 2) {
				continue
			}
			t.Run(s.Name+"/"+string(fs), func(t *testing.T) {
				t.Parallel()
				s.FS, s.Seed, s.Differ, s.Daemon = fs, seed, true, b.Daemon(b.Ours, s.Name+"-"+string(fs))
				if alone {
					s.Daemon = lab.WithSync(s.Daemon, fsync.OwnFiles)
				}
				r, err := lab.Record(t.Context(), s)
				if err != nil {
					t.Fatal(err)
				}
				check := lab.Check{
					Recording: r, Cases: lab.Some(state.Enumerate(r.Log, state.Options{From: r.Start, Seed: seed, Want: differStates(t)}), differStates(t)),
					Subject: inProcess, Sample: daemons(b, "boot-"+s.Name+"-"+string(fs)), Every: 8, Deep: 25, Nested: 25, Inner: 12, Strict: true,
				}
				tally, err := check.Run(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				logTally(t, tally)
				if tally.Nested == 0 {
					t.Error("no recovery was cut again")
				}
				if tally.Lost != 0 || tally.Lies != 0 || tally.Flawed != 0 || unmeasured(tally) {
					t.Error("not everything survived")
				}
			})
		}
	}
}

// differStates is how many states of each recording are examined.
func differStates(t *testing.T) int {
	text := os.Getenv("DURABLE_TEST_DIFFER_STATES")
	if text == "" {
		return 16
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestDifferOnFailingDisk: the k-th write to the disk fails while layers are extracted by
// our diff service, or a cache flush does. What was acknowledged all the same is whole. On
// ext4 and xfs, also when it syncs the files of the layers alone.
func TestDifferOnFailingDisk(t *testing.T) {
	t.Parallel()
	b := theBench(t)
	for _, fs := range kinds {
		for _, place := range []lab.Place{lab.Data, lab.Flush} {
			for _, alone := range []bool{false, true} {
				name := string(fs) + "/" + string(place)
				daemon := b.Daemon(b.Ours, "failing-"+string(fs)+"-"+string(place))
				if alone {
					if fs == disk.Btrfs {
						continue // always syncs the file system
					}
					name, daemon = "files/"+name, lab.WithSync(b.Daemon(b.Ours, "failing-files-"+string(fs)+"-"+string(place)), fsync.OwnFiles)
				}
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					failDiffer(t, fs, place, daemon)
				})
			}
		}
	}
}

func failDiffer(t *testing.T, fs disk.FS, place lab.Place, daemon oracle.Process) {
	hits, acked := 0, 0
	for k := 0; k < 40; k += kittest.Step(20) {
		f := lab.Failing{
			FS: fs, Seed: seed, Name: "differ-failing", Daemon: daemon, Differ: true,
			Place: place, Fault: disk.Fault{Skip: k, Times: 1, Errno: syscall.EIO}, Observed: k%2 == 1,
		}
		failed, err := f.Run(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if failed.Lost != 0 || failed.Lies != 0 {
			logTally(t, failed.Tally)
			t.Errorf("%s: an acknowledged layer is not whole", f)
		}
		hits, acked = hits+failed.Hits, acked+failed.Acked
		if failed.Hits == 0 {
			break
		}
	}
	t.Logf("%d writes failed, %d Commits were acknowledged", hits, acked)
	if hits == 0 {
		t.Error("nothing failed")
	}
}

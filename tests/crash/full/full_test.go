package full

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// bench is shared by all tests: none of it is on a disk under test.
var bench *Bench

func TestMain(m *testing.M) {
	disk.Init()
	os.Exit(kit.Main(func() int { return withBench(m) }))
}

func withBench(m *testing.M) int {
	programs, err := lab.NewBench()
	if err == nil {
		bench, err = NewBench(context.Background(), programs)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code := m.Run()
	for _, close := range []func() error{bench.Close, programs.Close} {
		if err := close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	return code
}

// seed of all recordings here. crashlab runs others.
const seed = 1

// TestOrderly cuts the power under a node that pulls, removes and collects, and
// TestInterrupted under one whose clients go away: nothing that was acknowledged
// is lost, nothing is called whole that is not, and every image can be pulled
// again and removed without a trace.
func TestOrderly(t *testing.T) {
	for _, c := range []struct {
		fs     disk.FS
		states int
	}{{disk.Ext4, 12}, {disk.XFS, 6}, {disk.Btrfs, 6}} {
		t.Run(string(c.fs), func(t *testing.T) {
			r := record(t, Setup{FS: c.fs, Daemon: ours("record"), Name: "orderly"})
			survives(t, r, c.states)
		})
	}
}

func TestInterrupted(t *testing.T) {
	for _, c := range []struct {
		fs     disk.FS
		states int
	}{{disk.Ext4, 8}, {disk.XFS, 4}, {disk.Btrfs, 4}} {
		t.Run(string(c.fs), func(t *testing.T) {
			r := record(t, Setup{FS: c.fs, Daemon: ours("record"), Name: "interrupted", Interrupted: true})
			t.Log(r.Interrupts)
			if r.Interrupts.Cancelled == 0 {
				t.Error("no client went away in time: this has tested nothing")
			}
			if r.Interrupts.Orphaned > 0 || len(r.Interrupts.Failed) > 0 {
				t.Errorf("pulls by clients who stayed: %d ended without a parent snapshot, and otherwise failed: %q", r.Interrupts.Orphaned, r.Interrupts.Failed)
			}
			survives(t, r, c.states)
		})
	}
}

// TestCRI cuts the power under a node whose images are pulled and removed by the CRI plugin: after
// the boot it lists every image whose pull was answered, and a container of each image that it
// lists sees what the image's tars describe.
func TestCRI(t *testing.T) {
	for _, c := range []struct {
		fs     disk.FS
		states int
	}{{disk.Ext4, 8}, {disk.XFS, 4}, {disk.Btrfs, 4}} {
		t.Run(string(c.fs), func(t *testing.T) {
			r := record(t, Setup{FS: c.fs, Daemon: ours("record"), Name: ByCRI, Rounds: 4})
			if tally := survives(t, r, c.states); tally.Created == 0 {
				t.Error("no container was created: this has tested nothing")
			}
		})
	}
}

// TestSecond cuts the power a second time, while the node recovers from the
// first cut and pulls what is missing.
func TestSecond(t *testing.T) {
	r := record(t, Setup{FS: disk.Ext4, Daemon: ours("record"), Name: "second", Interrupted: true})
	cases := r.Choose(12) // in the order of the log
	for _, k := range []state.Case{cases[3], cases[9]} {
		t.Run(k.State.String(), func(t *testing.T) {
			second, err := bench.Second(t.Context(), r, k, ours("record"))
			if err != nil {
				t.Fatal(err)
			}
			survives(t, second, 6)
		})
	}
}

// TestControl is the same experiment with the built-in overlayfs. If it found
// nothing there, what it does not find elsewhere would mean nothing.
func TestControl(t *testing.T) {
	for _, fs := range []disk.FS{disk.Ext4, disk.XFS, disk.Btrfs} {
		t.Run(string(fs), func(t *testing.T) {
			r := record(t, Setup{FS: fs, Name: "stock"})
			lost := func(r lab.Result) bool { return oracle.Has(r.Findings, oracle.Lost) }
			tally := run(t, &Check{Recording: r, Cases: r.Choose(40), Until: lost})
			if tally.Lost == 0 {
				t.Fatalf("the built-in overlayfs has lost nothing in %d states", tally.States)
			}
			t.Log(tally.Worst(1)[0])
		})
	}
}

// TestMutant wakes a defect in the daemon that does the work, and examines with one
// that has none. The state that shows it shows it again when the recording was
// kept and read back, and the state is chosen by its name.
func TestMutant(t *testing.T) {
	no := lab.Mutant{Name: "no-syncfs"}
	r := record(t, Setup{FS: disk.Ext4, Daemon: bench.Mutation(no, "record"), Name: "mutant"})
	lost := func(r lab.Result) bool { return oracle.Has(r.Findings, oracle.Lost) }
	tally := run(t, &Check{Recording: r, Cases: r.Choose(40), Until: lost})
	if tally.Lost == 0 {
		t.Fatalf("%s was not caught in %d states", no.Name, tally.States)
	}
	worst := tally.Worst(1)[0]
	t.Logf("%s: caught in %d states: %s", no.Name, tally.FirstBad, worst)

	_, name, _ := strings.Cut(worst.ID, "/")
	path, err := state.ParsePath(name)
	if err != nil {
		t.Fatal(err)
	}
	// As another run would do it, days later.
	dir := t.TempDir()
	if err := r.Save(dir); err != nil {
		t.Fatal(err)
	}
	loaded, err := lab.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	held := 0
	again := run(t, &Check{
		Recording: bench.Adopt(loaded), Cases: []state.Case{{State: path[0], Points: []int{path[0].Point}}},
		Hold: func(_ lab.Result, mountpoint string) {
			for _, dir := range []string{containerdDir, snapshotterDir} {
				if _, err := os.Stat(filepath.Join(mountpoint, dir)); err == nil {
					held++
				}
			}
		},
	})
	if held != 2 {
		t.Errorf("%s was shown without its directories", worst.ID)
	}
	if again.Clean() {
		t.Errorf("%s was %s, and survived when it was chosen by its name", worst.ID, worst.Verdict)
	}
}

func ours(who string) oracle.Process { return bench.Daemon(bench.Ours, who) }

func record(t *testing.T, s Setup) *Recording {
	t.Helper()
	s.Seed = seed
	r, err := bench.Record(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %d writes, %d flushes, %d marks", r.ID(), r.Stats.Writes, r.Stats.Flushes, r.Stats.Marks)
	return r
}

func run(t *testing.T, c *Check) *Tally {
	t.Helper()
	c.Subject = func(n int) oracle.Process { return ours(fmt.Sprintf("boot-%d", n)) }
	tally, err := c.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return tally
}

// survives examines states of a recording and expects all to be well.
func survives(t *testing.T, r *Recording, states int) *Tally {
	t.Helper()
	tally := run(t, &Check{Recording: r, Cases: r.Choose(states)})
	t.Log(tally.Tally.Counts)
	t.Log(tally.Counts)
	for _, n := range tally.Notes {
		t.Log(n)
	}
	for _, bad := range tally.Worst(5) {
		if bad.Verdict > lab.NotMeasured {
			t.Error(bad)
		}
	}
	if !tally.Clean() {
		t.Errorf("%d lost, %d lies, %d flawed", tally.Lost, tally.Lies, tally.Flawed)
	}
	if tally.States < states || tally.Survived < states*9/10 {
		t.Errorf("%d of %d states survived, %d were not measured: too few to mean anything", tally.Survived, states, tally.NotMeasured)
	}
	return tally
}

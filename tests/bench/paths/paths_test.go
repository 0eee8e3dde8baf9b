package paths

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

func TestMain(m *testing.M) { os.Exit(kit.Main(m.Run)) }

// TestRun: a small run has every call with both, and both kinds of starts, and leaves nothing.
func TestRun(t *testing.T) {
	r, err := Run(t.Context(), Options{
		Snapshots: []int{300, 20}, Depths: []int{1, deepest}, Rounds: 2, Starts: 1, FS: "ext4", Command: "bench paths", Log: t.Logf,
	})
	if err != nil {
		t.Fatal(err)
	}
	// At 20 there is no deep chain; Walk has no depth.
	if want := 2 * (3*(len(ops)-1) + 2); len(r.Calls) != want {
		t.Errorf("%d kinds of calls, want %d", len(r.Calls), want)
	}
	for _, c := range r.Calls {
		if c.Count < 2 || c.Median <= 0 || c.P99 < c.Median || r.find(func(o Call) bool { return o.Op == c.Op && o.Variant != c.Variant }) == nil {
			t.Errorf("%+v", c)
		}
	}
	if len(r.Starts) != 8 {
		t.Errorf("%d starts, want 8", len(r.Starts))
	}
	for _, s := range r.Starts {
		if s.Socket <= 0 || s.Stat <= 0 || s.Memory < s.Private || s.Private == 0 {
			t.Errorf("%+v", s)
		}
	}
	file := filepath.Join(t.TempDir(), "paths-x.json")
	again, err := &Report{}, r.Save(file)
	if err == nil {
		again, err = Load(file)
	}
	if err != nil || again.Table() != r.Table() {
		t.Errorf("it is another report after it was saved: %v", err)
	}
}

// TestTable: ratios are to the same call of the other, and to the same with fewer snapshots.
func TestTable(t *testing.T) {
	r := &Report{Calls: []Call{
		{Snapshots: 100, Depth: 10, Op: "Stat", Variant: Durable, Median: 220e-6, P99: 500e-6},
		{Snapshots: 100, Depth: 10, Op: "Stat", Variant: Overlayfs, Median: 200e-6, P99: 400e-6},
		{Snapshots: 10_000, Depth: 10, Op: "Stat", Variant: Durable, Median: 440e-6, P99: 500e-6},
		{Snapshots: 10_000, Depth: 10, Op: "Stat", Variant: Overlayfs, Median: 200e-6, P99: 400e-6},
		{Snapshots: 10_000, Op: "Walk", Variant: Durable, Median: 0.07, P99: 0.08, CPU: 0.069},
		{Snapshots: 10_000, Op: "Walk", Variant: Overlayfs, Median: 0.05, P99: 0.06, CPU: 0.047},
	}, Starts: []Start{
		{Snapshots: 100, Variant: Durable, Socket: 0.05, Stat: 0.003, Memory: 23 << 20, Private: 5 << 20},
		{Snapshots: 100, Variant: Durable, Socket: 0.07, Stat: 0.003, Memory: 23 << 20, Private: 5 << 20, Unclean: true},
	}}
	table := r.Table()
	for _, line := range []string{
		"| Stat | 100 | 10 | 220 | 200 | 1.10 | – | 500 | 400 |",
		"| Stat | 10000 | 10 | 440 | 200 | 2.20 | 2.00 | 500 | 400 |",
		"| 10000 | 69.0 | 47.0 | 0.69 |",
		"| 100 | durable | a stop | 0.05 | 3.0 | 23 | 5 |",
		"| 100 | durable | a power cut | 0.07 | 3.0 | 23 | 5 |",
	} {
		if !strings.Contains(table, line+"\n") {
			t.Errorf("the table lacks %s:\n%s", line, table)
		}
	}
}

// TestDocuments: docs/performance.md has the table of each report on calls in docs/bench.
func TestDocuments(t *testing.T) {
	for _, err := range published.Unlike("paths-", func(file string) (published.Report, error) { return Load(file) }) {
		t.Error(err)
	}
}

package layers

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"
	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/pulls"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

func TestMain(m *testing.M) {
	pulls.Init()
	os.Exit(kit.Main(m.Run))
}

// TestRun: a small run has each setting of sync, alone and beside a neighbor.
func TestRun(t *testing.T) {
	r, err := Run(t.Context(), Options{Rounds: 1, Chain: 2, Neighbor: 50e6, FS: "ext4", Command: "bench layers", Log: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Rows) != 2*len(settings) {
		t.Errorf("%d rows", len(r.Rows))
	}
	for i, row := range r.Rows {
		if row.Commit.Count != 2 || row.Apply.P50 <= row.Synced.P50 || row.Synced.P50 <= 0 || row.Flush.P50 <= 0 || (row.Rate > 0) != (i%2 == 1) {
			t.Errorf("row %d: %+v", i, row)
		}
	}
	file := filepath.Join(t.TempDir(), "layers-x.json")
	again, err := &Report{}, r.Save(file)
	if err == nil {
		again, err = Load(file)
	}
	if err != nil || again.Table() != r.Table() {
		t.Errorf("it is another report after it was saved: %v", err)
	}
}

func TestTable(t *testing.T) {
	r := &Report{Rounds: 10, Chain: 20, Rows: []Row{
		{Sync: "syncfs", Commit: pulls.Latency{P50: .001, P99: .002, Max: .003}, Flush: pulls.Latency{P50: .004, P99: .005, Max: .006}, Synced: pulls.Latency{P50: .1, P99: .2, Max: .3}, Apply: pulls.Latency{P50: 1, P99: 2, Max: 3}},
		{Sync: "files", Rate: 400e6},
	}}
	table := r.Table()
	for _, line := range []string{
		"| syncfs | – | 1.0 | 2.0 | 3.0 | 4.0 | 5.0 | 6.0 | 100.0 | 200.0 | 300.0 | 1000.0 | 2000.0 | 3000.0 |",
		"| files | 400 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 |",
	} {
		if !strings.Contains(table, line+"\n") {
			t.Errorf("the table lacks %s:\n%s", line, table)
		}
	}
}

// TestDocuments: docs/performance.md has the table of each report on layers in docs/bench.
func TestDocuments(t *testing.T) {
	for _, err := range published.Unlike("layers-", func(file string) (published.Report, error) { return Load(file) }) {
		t.Error(err)
	}
}

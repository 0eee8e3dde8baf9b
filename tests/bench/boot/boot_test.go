package boot

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

// TestRun: a small run has every kind of boot, in order, and leaves nothing. Only after a power
// cut everything is verified, which takes reading.
func TestRun(t *testing.T) {
	r, err := Run(t.Context(), Options{Layers: []int{Fewest}, Rounds: 2, FS: "ext4", Disk: "250", Command: "bench boot", Log: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Boots) != 2*len(variants) {
		t.Errorf("%d boots", len(r.Boots))
	}
	read := map[string]int64{}
	for _, b := range r.Boots {
		if b.Layers != Fewest || b.Entries < 2*3000 || b.Socket <= 0 || b.Pause <= b.Socket || b.Pod <= b.Pause || b.Pods <= b.Pod || b.Images <= b.Pods || (b.Verified > 0) != (b.Variant == Cut) ||
			b.Read == 0 || b.Fdatasync.Count == 0 {
			t.Errorf("%+v", b)
		}
		read[b.Variant] += b.Read
	}
	if read[Cut] < read[Stop]+2*256*6000 {
		t.Errorf("the inodes were not read: %v", read)
	}
	file := filepath.Join(t.TempDir(), "boot-x.json")
	again, err := &Report{}, r.Save(file)
	if err == nil {
		again, err = Load(file)
	}
	if err != nil || again.Table() != r.Table() {
		t.Errorf("it is another report after it was saved: %v", err)
	}
}

// TestTable: medians of the boots of a kind, and the maximum of all for the maximum.
func TestTable(t *testing.T) {
	r := &Report{}
	for i := range 3 {
		seconds := float64(i + 1)
		r.Boots = append(r.Boots,
			Boot{Layers: 1000, Entries: 5, Variant: Cut, Socket: seconds, Pause: seconds, Pod: seconds, Pods: seconds, Images: seconds, Verified: 10 * seconds, Read: int64(i+1) << 20, Fdatasync: &pulls.Latency{P50: seconds, P99: seconds, Max: seconds}},
			Boot{Layers: 1000, Entries: 5, Variant: Overlayfs, Socket: seconds, Pause: seconds, Pod: seconds, Pods: seconds, Images: seconds, Fdatasync: &pulls.Latency{}},
		)
	}
	table := r.Table()
	for _, line := range []string{
		"| 1000 | 5 | durable, after a power cut | 2.00 | 2.00 | 2.00 | 2.00 | 2.00 | 20.00 | 2 | 2000.00 | 2000.00 | 3000.00 |",
		"| 1000 | 5 | overlayfs | 2.00 | 2.00 | 2.00 | 2.00 | 2.00 | – | 0 | 0.00 | 0.00 | 0.00 |",
	} {
		if !strings.Contains(table, line+"\n") {
			t.Errorf("the table lacks %s:\n%s", line, table)
		}
	}
}

// TestDocuments: docs/performance.md has the table of each report on boots in docs/bench.
func TestDocuments(t *testing.T) {
	for _, err := range published.Unlike("boot-", func(file string) (published.Report, error) { return Load(file) }) {
		t.Error(err)
	}
}

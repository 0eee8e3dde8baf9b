package campaign

import (
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
)

// TestTurns: a campaign of all workloads makes the recordings that campaigns of each would.
func TestTurns(t *testing.T) {
	all := Options{Workload: All, FS: []disk.FS{disk.Ext4}, States: 1}
	if err := all.Validate(); err != nil {
		t.Fatal(err)
	}
	turns := map[Workload]int{}
	for round := range 40 {
		w, turn := all.turn(round)
		if turn != turns[w] {
			t.Errorf("round %d is turn %d of %s, want %d", round, turn, w, turns[w])
		}
		turns[w]++
		if one := (Options{Workload: w}); most[w] == 0 {
			t.Errorf("a recording of %s gives no state", w)
		} else if alone, n := one.turn(turn); alone != w || n != turn {
			t.Errorf("turn %d of %s alone is %d of %s", turn, w, n, alone)
		}
	}
	for _, w := range each {
		if turns[w] != 40/len(each) {
			t.Errorf("%s has %d of 40 rounds", w, turns[w])
		}
	}
}

package crash

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
)

// TestSameContent examines each disk, and then each content once: both must find the same, of a
// snapshotter that loses layers, and of ours.
func TestSameContent(t *testing.T) {
	t.Parallel()
	b := theBench(t)
	for _, fs := range kinds {
		t.Run(string(fs), func(t *testing.T) {
			t.Parallel()
			who := "same-" + string(fs)
			stock, err := lab.Record(t.Context(), lab.Setup{FS: fs, Seed: seed, Name: "overlayfs", Daemon: b.StockDaemon(who)})
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range []struct {
				recording *lab.Recording
				subject   func(int) oracle.Subject
				states    int
				bad       bool
			}{
				{stock, func(n int) oracle.Subject { return b.StockDaemon(fmt.Sprintf("%s-%d", who, n)) }, 24, true},
				{oursOn(t, fs), inProcess, 60, false},
			} {
				r := c.recording
				cases := state.Enumerate(r.Log, state.Options{From: r.Start, Seed: seed, Want: 500})
				cases = cases[len(cases)/2:][:c.states] // neighbors, as in a campaign
				each, alone := verdicts(t, &lab.Check{Recording: r, Cases: cases, Subject: c.subject, Strict: !c.bad, Alone: true})
				once, tally := verdicts(t, &lab.Check{Recording: r, Cases: cases, Subject: c.subject, Strict: !c.bad})
				if alone.Same != 0 || tally.Same == 0 && !c.bad { // few disks are the same where data arrives late
					t.Errorf("%s: %d and %d disks were not examined, want none and some", r.ID(), alone.Same, tally.Same)
				}
				if bad := alone.Survived < alone.States; bad != c.bad {
					t.Errorf("%s: %s", r.ID(), alone)
				}
				for _, id := range slices.Sorted(maps.Keys(each)) {
					if each[id] != once[id] {
						t.Errorf("%s\nexamined:\n%sof the same content:\n%s", id, each[id], once[id])
					}
				}
				t.Log(tally)
			}
		})
	}
}

// verdicts runs a check and returns what was found in each state, without what differs from one
// examination to the next: temporary names in errors.
func verdicts(t *testing.T, c *lab.Check) (map[string]string, *lab.Tally) {
	t.Helper()
	var mu sync.Mutex
	found := map[string]string{}
	c.Each = func(r lab.Result) {
		text := r.Verdict.String() + "\n"
		for _, f := range r.Findings {
			text += fmt.Sprintf("  %s %s\n", f.Kind, f.Name)
		}
		mu.Lock()
		defer mu.Unlock()
		found[r.ID] = text
	}
	tally, err := c.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return found, tally
}

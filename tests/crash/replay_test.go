package crash

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
)

// TestReplay finds a bad state of a mutant, and finds it again by name in a
// recording that was saved and loaded: once a state of the first cut, once a
// state of the second, where the mutant has extracted again what the first cut
// had left undone.
func TestReplay(t *testing.T) {
	t.Parallel()
	b := theBench(t)
	m := lab.Mutant{Name: "no-syncfs"}
	mutant := func(n int) oracle.Subject { return b.Mutation(m, fmt.Sprintf("replay-%d", n)) }
	for _, c := range []struct {
		name    string
		daemon  oracle.Process             // does the work
		subject func(n int) oracle.Subject // recovers
		cuts    int
	}{
		{"first cut", b.Mutation(m, "replay"), inProcess, 1},
		{"second cut", b.Daemon(b.Ours, "replay"), mutant, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := lab.Record(t.Context(), lab.Setup{FS: disk.Ext4, Seed: seed, Name: "replayed", Daemon: c.daemon})
			if err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(t.TempDir(), "recording")
			if err := r.Save(dir); err != nil {
				t.Fatal(err)
			}
			before, recovery := findBad(t, r, c.subject, c.cuts)
			loaded, err := lab.Load(dir)
			if err != nil {
				t.Fatal(err)
			}
			held := false
			replay := lab.Replay{Recording: loaded, Path: before.Path, Recovery: recovery, Subject: oracle.InProcess{}}
			again, err := replay.Run(t.Context(), func(_ lab.Result, mountpoint string) error {
				held = true
				_, err := os.ReadDir(mountpoint)
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Log(before)
			if again.Verdict != before.Verdict || again.ID != before.ID {
				t.Errorf("%s was %s, and %s is %s", before.ID, before.Verdict, again.ID, again.Verdict)
			}
			if !held {
				t.Error("it was not mounted and held")
			}
		})
	}
}

// findBad searches for a state of so many cuts with a lost layer or a lie, and
// returns it with the log of the recovery before a second cut.
func findBad(t *testing.T, r *lab.Recording, subject func(int) oracle.Subject, cuts int) (lab.Result, []disk.Entry) {
	t.Helper()
	var (
		mu         sync.Mutex
		bad        *lab.Result
		recoveries = map[state.State][]disk.Entry{}
	)
	check := lab.Check{
		Recording: r, Subject: subject, Nested: cuts - 1,
		Cases: lab.Some(state.Enumerate(r.Log, state.Options{From: r.Start, Seed: seed}), 30),
		Keep: func(first state.State, recovery []disk.Entry) error {
			mu.Lock()
			defer mu.Unlock()
			recoveries[first] = recovery
			return nil
		},
		Until: func(r lab.Result) bool {
			mu.Lock()
			defer mu.Unlock()
			if bad == nil && r.Verdict > lab.Flawed && len(r.Path) == cuts {
				bad = &r
			}
			return bad != nil
		},
	}
	if _, err := check.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if bad == nil {
		t.Fatalf("no bad state of cut number %d", cuts)
	}
	if cuts == 1 {
		return *bad, nil
	}
	return *bad, recoveries[bad.Path[0]]
}

package crash

import (
	"path/filepath"
	"sync"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
)

// TestReplay finds bad states of a mutant, of a first and of a second cut, and
// finds them again by name, in a recording that was saved and loaded.
func TestReplay(t *testing.T) {
	b := theBench(t)
	m := lab.Mutant{Name: "no-syncfs"}
	r, err := lab.Record(t.Context(), lab.Setup{FS: disk.Ext4, Seed: seed, Name: "mutant", Daemon: b.Mutation(m, "replay")})
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "recording")
	if err := r.Save(dir); err != nil {
		t.Fatal(err)
	}
	var (
		mu         sync.Mutex
		bad        = map[int]lab.Result{} // by the length of its path
		recoveries = map[state.State][]disk.Entry{}
	)
	check := lab.Check{
		Recording: r, Subject: inProcess, Nested: 2,
		Cases: lab.Some(state.Enumerate(r.Log, state.Options{From: r.Start, Seed: seed}), 40),
		Keep: func(first state.State, recovery []disk.Entry) error {
			mu.Lock()
			defer mu.Unlock()
			recoveries[first] = recovery
			return nil
		},
		Until: func(r lab.Result) bool {
			mu.Lock()
			defer mu.Unlock()
			if r.Verdict > lab.Flawed {
				bad[len(r.Path)] = r
			}
			return len(bad) == 2
		},
	}
	if _, err := check.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	loaded, err := lab.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= 2; n++ {
		before, ok := bad[n]
		if !ok {
			t.Errorf("no bad state of a cut number %d", n)
			continue
		}
		replay := lab.Replay{Recording: loaded, Path: before.Path, Subject: oracle.InProcess{}}
		if n == 2 {
			replay.Recovery = recoveries[before.Path[0]]
		}
		held := false
		again, err := replay.Run(t.Context(), func(_ lab.Result, mountpoint string) error {
			held = true
			_, err := filepath.Glob(filepath.Join(mountpoint, "root", "*"))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if again.Verdict != before.Verdict || again.ID != before.ID {
			t.Errorf("%s was %s, and %s is %s", before.ID, before.Verdict, again.ID, again.Verdict)
		}
		if !held {
			t.Errorf("%s was not mounted for a look", before.ID)
		}
	}
}

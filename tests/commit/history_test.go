package commit

import (
	"fmt"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestHistoryIsBounded removes more layers than the journal may remember. Only
// entries of removed ones go, the oldest first; those of existing snapshots
// stay, however old they are.
func TestHistoryIsBounded(t *testing.T) {
	const keep, kept, removed = 5, 8, 12
	disk := newDisk(t, kit.DiskOptions{FS: "ext4", Size: 256 << 20})
	d := newDaemon(t, kit.DaemonOptions{Dir: disk.Path("durable"), Config: fmt.Sprintf("[journal]\nhistory = %d\n", keep)})
	sn := start(t, d)
	ctx := t.Context()
	commit := func(name string) {
		t.Helper()
		key := "active " + name
		dir := upper(t, must[mounts](t)(sn.Prepare(ctx, key, "")))
		check(t, writeLayer(dir, 0))
		check(t, sn.Commit(ctx, name, key))
	}
	for i := range kept {
		commit(fmt.Sprintf("kept-%d", i))
	}
	for i := range removed {
		name := fmt.Sprintf("removed-%d", i)
		commit(name)
		check(t, sn.Remove(ctx, name))
	}
	cleanUp(t, sn)

	verify := func(when string) {
		t.Helper()
		r := kittest.Inspect(t, d)
		have := map[string]bool{}
		for _, e := range r.Journal.Committed {
			have[e.Name] = true
		}
		for i := range kept {
			if name := fmt.Sprintf("kept-%d", i); !have[name] {
				t.Errorf("%s: the entry of %s, which exists, is gone", when, name)
			}
		}
		if len(have) != kept {
			t.Errorf("%s: %d entries of committed snapshots, want %d", when, len(have), kept)
		}
		if len(r.Journal.History) != keep {
			t.Fatalf("%s: %d entries of history, want %d", when, len(r.Journal.History), keep)
		}
		for i, e := range r.Journal.History {
			if want := fmt.Sprintf("removed-%d", removed-keep+i); e.Name != want {
				t.Errorf("%s: entry %d of the history is of %s, want %s", when, i, e.Name, want)
			}
		}
	}
	verify("before the restart")
	check(t, d.Restart(ctx))
	verify("after the restart")
	check(t, d.Stop())
	verify("stopped")
}

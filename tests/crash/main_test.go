package crash

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

func TestMain(m *testing.M) {
	disk.Init()
	// A test is alone if it depends on the boot in which a daemon runs, as healings and TestCut
	// do: every examination is a boot of the whole namespace.
	kit.Parallel(4)
	// containerd's content store warns of file systems without fs-verity.
	_ = log.SetLevel("error")
	os.Exit(kit.Main(func() int { return kit.InMemory(m.Run) }))
}

var kinds = []disk.FS{disk.Ext4, disk.XFS, disk.Btrfs}

// seed of everything here. What it gives differs from run to run all the same,
// because goroutines and the kernel take their turns as they come.
const seed = 1

// bench holds the programs, built once.
var bench = sync.OnceValues(func() (*lab.Bench, error) { return lab.NewBench() })

func theBench(t *testing.T) *lab.Bench {
	t.Helper()
	b, err := bench()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// ours are recordings of durable-snapshotter on each file system, made once and
// side by side: most of it is waiting for background writes.
var ours = sync.OnceValues(func() (map[disk.FS]*lab.Recording, error) {
	b, err := bench()
	if err != nil {
		return nil, err
	}
	var (
		mu      sync.Mutex
		running sync.WaitGroup
		errs    []error
		out     = map[disk.FS]*lab.Recording{}
	)
	for _, fs := range kinds {
		running.Go(func() {
			// Every point is examined, so it is little work. btrfs writes three times as
			// much for the same.
			s := lab.Setup{FS: fs, Seed: seed, Name: "ours", Daemon: b.Daemon(b.Ours, "ours-"+string(fs)), Idle: true, Layers: workload.Size{Chains: 2, Layers: 3}}
			if fs == disk.Btrfs {
				s.Layers.Layers = 2
			}
			r, err := lab.Record(context.Background(), s)
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
			out[fs] = r
		})
	}
	running.Wait()
	return out, errors.Join(errs...)
})

func oursOn(t *testing.T, fs disk.FS) *lab.Recording {
	t.Helper()
	all, err := ours()
	if err != nil {
		t.Fatal(err)
	}
	return all[fs]
}

func inProcess(int) oracle.Subject { return oracle.InProcess{} }

// daemons returns a Subject for each worker: our daemon as a process.
func daemons(b *lab.Bench, who string) func(int) oracle.Subject {
	return func(n int) oracle.Subject { return b.Daemon(b.Ours, fmt.Sprintf("%s-%d", who, n)) }
}

// logTally logs the counts and the worst states.
func logTally(t *testing.T, tally *lab.Tally) {
	t.Helper()
	t.Log(tally.Counts)
	for _, r := range tally.Worst(5) {
		t.Log(r)
	}
}

// unmeasured reports whether too few states were judged. A file system that does not come back
// is not ours to judge; if that were usual, nothing would have been judged.
func unmeasured(t *lab.Tally) bool { return t.NotMeasured > 1 && t.NotMeasured*100 > t.States }

package commit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// racers is a daemon on a disk of its own, for calls that meet.
type racers struct {
	daemon *kit.Daemon
	sn     snapshots.Snapshotter
	want   []kit.Tree
}

func newRacers(t *testing.T) racers {
	t.Helper()
	disk := newDisk(t, kit.DiskOptions{FS: "ext4", Size: 512 << 20})
	d := newDaemon(t, kit.DaemonOptions{Dir: disk.Path("durable")})
	return racers{d, start(t, d), reference(t, 1)}
}

// written prepares an active snapshot that holds layer 0.
func (r racers) written(t *testing.T, key string) {
	t.Helper()
	check(t, writeLayer(upper(t, must[mounts](t)(r.sn.Prepare(t.Context(), key, ""))), 0))
}

// together runs functions at the same time and returns their errors.
func together(fs ...func() error) []error {
	errs := make([]error, len(fs))
	begin := make(chan struct{})
	var running sync.WaitGroup
	for i, f := range fs {
		running.Go(func() {
			<-begin
			errs[i] = f()
		})
	}
	close(begin)
	running.Wait()
	return errs
}

// whole checks that a name is committed, is what was written, and that the key
// it came from is gone.
func (r racers) whole(t *testing.T, name, key string) {
	t.Helper()
	info, err := r.sn.Stat(t.Context(), name)
	if err != nil || info.Kind != snapshots.KindCommitted {
		t.Fatalf("stat %s: %v, %v, want it committed", name, info.Kind, err)
	}
	r.absent(t, key)
	row, ok := kittest.Inspect(t, r.daemon).Find(name)
	if !ok {
		t.Fatalf("%s is not on record", name)
	}
	sameTree(t, name, r.daemon.LayerDir(row.ID), r.want[0])
}

func (r racers) absent(t *testing.T, name string) {
	t.Helper()
	if info, err := r.sn.Stat(t.Context(), name); !errdefs.IsNotFound(err) {
		t.Fatalf("stat %s: %v, %v, want not found", name, info.Kind, err)
	}
}

func TestTwoCommitsOfOneKey(t *testing.T) {
	r := newRacers(t)
	ctx := t.Context()
	for i := range 20 {
		key, names := fmt.Sprint("key-", i), [2]string{fmt.Sprint("one-", i), fmt.Sprint("two-", i)}
		r.written(t, key)
		errs := together(
			func() error { return r.sn.Commit(ctx, names[0], key) },
			func() error { return r.sn.Commit(ctx, names[1], key) },
		)
		winner, loser := 0, 1
		if errs[0] != nil {
			winner, loser = 1, 0
		}
		if errs[winner] != nil || !errdefs.IsNotFound(errs[loser]) {
			t.Fatalf("round %d: %v and %v, want one nil and one not found", i, errs[0], errs[1])
		}
		r.whole(t, names[winner], key)
		r.absent(t, names[loser])
	}
}

// TestTwoCommitsOfOneName has two extractions of the same layer finish at once,
// as two pulls of images that share it do.
func TestTwoCommitsOfOneName(t *testing.T) {
	r := newRacers(t)
	ctx := t.Context()
	for i := range 20 {
		keys, name := [2]string{fmt.Sprint("key-a-", i), fmt.Sprint("key-b-", i)}, fmt.Sprint("name-", i)
		r.written(t, keys[0])
		r.written(t, keys[1])
		errs := together(
			func() error { return r.sn.Commit(ctx, name, keys[0]) },
			func() error { return r.sn.Commit(ctx, name, keys[1]) },
		)
		winner, loser := 0, 1
		if errs[0] != nil {
			winner, loser = 1, 0
		}
		if errs[winner] != nil || !errdefs.IsAlreadyExists(errs[loser]) {
			t.Fatalf("round %d: %v and %v, want one nil and one already exists", i, errs[0], errs[1])
		}
		r.whole(t, name, keys[winner])
		if info, err := r.sn.Stat(ctx, keys[loser]); err != nil || info.Kind != snapshots.KindActive {
			t.Fatalf("stat %s: %v, %v, want it active", keys[loser], info.Kind, err)
		}
		check(t, r.sn.Remove(ctx, keys[loser]))
	}
	cleanUp(t, r.sn)
	noOrphans(t, r.daemon)
}

func TestCommitAgainstRemove(t *testing.T) {
	r := newRacers(t)
	ctx := t.Context()
	committed, removed := 0, 0
	for i := range 60 {
		key, name := fmt.Sprint("key-", i), fmt.Sprint("name-", i)
		r.written(t, key)
		// The call that arrives first wins; a head start for each in turn lets both.
		head := time.Duration(i%3) * time.Millisecond
		errs := together(
			func() error { time.Sleep(head); return r.sn.Commit(ctx, name, key) },
			func() error { time.Sleep(2*time.Millisecond - head); return r.sn.Remove(ctx, key) },
		)
		if errs[1] != nil {
			t.Fatalf("round %d: remove: %v", i, errs[1])
		}
		switch {
		case errs[0] == nil:
			committed++
			r.whole(t, name, key)
		case errdefs.IsNotFound(errs[0]):
			removed++
			r.absent(t, name)
			r.absent(t, key)
		default:
			t.Fatalf("round %d: commit: %v, want nil or not found", i, errs[0])
		}
	}
	if committed == 0 || removed == 0 {
		t.Errorf("%d commits and %d removals came first: the calls did not meet", committed, removed)
	}
	cleanUp(t, r.sn)
	noOrphans(t, r.daemon)
}

// TestCommitAgainstCleanup sweeps without pause while layers are prepared,
// committed and removed.
func TestCommitAgainstCleanup(t *testing.T) {
	r := newRacers(t)
	ctx := t.Context()
	done := make(chan struct{})
	sweeps := make(chan error, 1)
	go func() {
		for n := 1; ; n++ {
			if err := r.sn.(snapshots.Cleaner).Cleanup(ctx); err != nil {
				sweeps <- fmt.Errorf("sweep %d: %w", n, err)
				return
			}
			select {
			case <-done:
				sweeps <- nil
				return
			default:
			}
		}
	}()
	for i := range 40 {
		key, name := fmt.Sprint("key-", i), fmt.Sprint("name-", i)
		r.written(t, key)
		check(t, r.sn.Commit(ctx, name, key))
		if i%2 == 1 {
			check(t, r.sn.Remove(ctx, name))
		}
	}
	close(done)
	check(t, <-sweeps)
	for i := 0; i < 40; i += 2 {
		r.whole(t, fmt.Sprint("name-", i), fmt.Sprint("key-", i))
	}
	cleanUp(t, r.sn)
	noOrphans(t, r.daemon)
}

// TestCommitCancelled gives up on Commits, each a little later than the one
// before. Whatever answer the client got, the Commit has happened or it has not;
// in the second case the snapshot is still good for another.
func TestCommitCancelled(t *testing.T) {
	r := newRacers(t)
	ctx := t.Context()
	const rounds = 40
	write := func(key string) {
		t.Helper()
		dir := upper(t, must[mounts](t)(r.sn.Prepare(ctx, key, "")))
		check(t, writeLayer(dir, 0))
		// Enough entries for a walk in which there is time to give up.
		for i := range 1500 {
			check(t, os.WriteFile(filepath.Join(dir, fmt.Sprint("many-", i)), nil, 0o644))
		}
		check(t, setTimes(dir, time.Unix(1_700_000_000, 0)))
	}
	write("first")
	row, _ := kittest.Inspect(t, r.daemon).Find("first")
	r.want[0] = must[kit.Tree](t)(kit.Fingerprint(r.daemon.LayerDir(row.ID)))
	begin := time.Now()
	check(t, r.sn.Commit(ctx, "name-first", "first"))
	takes := time.Since(begin)

	happened, not := 0, 0
	for i := range rounds {
		key, name, second := fmt.Sprint("key-", i), fmt.Sprint("name-", i), fmt.Sprint("second-", i)
		write(key)
		// Up to four times what it needs, so that the last ones surely happen.
		limited, cancel := context.WithTimeout(ctx, 4*takes*time.Duration(i*i)/(rounds*rounds))
		err := r.sn.Commit(limited, name, key)
		cancel()
		// The client can be gone while the daemon still works on the answer. The
		// next call waits for the lock of this key, and so for its end.
		switch again := r.sn.Commit(ctx, second, key); {
		case again == nil && err != nil:
			not++
			if !errors.Is(err, context.DeadlineExceeded) && !errdefs.IsDeadlineExceeded(err) && !errdefs.IsCanceled(err) {
				t.Fatalf("round %d: commit: %v, want that its time was over", i, err)
			}
			r.whole(t, second, key)
			r.absent(t, name)
		case errdefs.IsNotFound(again):
			happened++
			r.whole(t, name, key)
			r.absent(t, second)
		default:
			t.Fatalf("round %d: commit: %v, and again: %v", i, err, again)
		}
		check(t, r.sn.Remove(ctx, name))
		check(t, r.sn.Remove(ctx, second))
		cleanUp(t, r.sn)
	}
	t.Logf("a commit takes %v; %d of %d happened", takes, happened, rounds)
	if happened == 0 || not == 0 {
		t.Errorf("%d commits happened and %d did not: none was given up at the right time", happened, not)
	}
	noOrphans(t, r.daemon)
}

// TestOpenAcrossRestart has a layer that is being unpacked and a container's
// snapshot open while the daemon ends, in the orderly way and by SIGKILL.
func TestOpenAcrossRestart(t *testing.T) {
	for _, how := range []string{"stop", "kill"} {
		t.Run(how, func(t *testing.T) {
			r := newRacers(t)
			ctx := t.Context()
			links := chain(2, "first")
			check(t, links[0].unpack(ctx, r.sn))
			check(t, writeLayer(must[string](t)(links[1].prepare(ctx, r.sn)), 1))
			const container = "default/900/container"
			dir := upper(t, must[mounts](t)(r.sn.Prepare(ctx, container, links[0].name)))
			check(t, writeLayer(dir, 0))

			if how == "stop" {
				check(t, r.daemon.Stop())
			} else {
				kill(t, r.daemon)
			}
			r.sn = start(t, r.daemon)

			err := links[1].commit(ctx, r.sn)
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "extract again") {
				t.Errorf("commit of an extraction from before the restart: %v, want failed precondition and \"extract again\"", err)
			}
			r.absent(t, links[1].name)
			for _, e := range kittest.Inspect(t, r.daemon).Journal.Open {
				if !e.CursorLost || e.Extraction == e.Abandoned.IsZero() {
					t.Errorf("journal after the restart: %+v, want the cursor lost, and an extraction abandoned", e)
				}
			}

			check(t, r.sn.Commit(ctx, "default/901/image", container))
			r.whole(t, "default/901/image", container)
			for _, e := range kittest.Inspect(t, r.daemon).Journal.Committed {
				if lost := strings.Contains(e.Strategy, "cursor lost"); lost != (e.Name == "default/901/image") {
					t.Errorf("journal: %s was committed with the strategy %q", e.Name, e.Strategy)
				}
			}

			check(t, r.sn.Remove(ctx, links[1].key))
			check(t, chain(2, "again")[1].unpack(ctx, r.sn))
			cleanUp(t, r.sn)
			noOrphans(t, r.daemon)
		})
	}
}

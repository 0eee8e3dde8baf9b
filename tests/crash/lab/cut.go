package lab

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// Way is one of the two cheaper ways to cut the power. They need no recording,
// and see less: each run is one cut, at one moment, and what had reached the
// block layer stays.
type Way string

// The ways.
const (
	// Shutdown makes the file system drop everything that it holds in memory
	// (FS_IOC_SHUTDOWN). ext4 and xfs can do that, btrfs cannot.
	Shutdown Way = "shutdown"
	// Kill ends the snapshotter with SIGKILL and leaves the kernel alone.
	Kill Way = "kill"
)

// Cut cuts the power at random moments of a workload.
type Cut struct {
	FS      disk.FS
	Way     Way
	Seed    uint64
	Times   int
	Layers  workload.Size
	Daemon  oracle.Process // does the work
	Subject oracle.Subject // recovers and answers
	Sync    bool           // containerd's own sync at the end of each extraction
	Strict  bool
	Name    string
	Until   func(Result) bool // stops when it returns true; may be nil
}

// cutting is a Cut in progress.
type cutting struct {
	*Cut
	plan       *workload.Plan
	record     *workload.Record
	disk       *disk.Plain
	scratch    string
	mountpoint string
	whole      time.Duration // of a workload that is not cut
}

// Run does the workload once without a cut, to know what must be there, and
// then Times times with one.
func (c *Cut) Run(ctx context.Context) (tally *Tally, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cut by %s, %s on %s: %w", c.Way, c.Name, c.FS, err)
		}
	}()
	k := &cutting{Cut: c}
	if k.plan, err = workload.NewPlan(c.Seed, c.Layers); err != nil {
		return nil, err
	}
	if k.scratch, err = os.MkdirTemp("", "cut"); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(k.scratch)) }()
	k.mountpoint = filepath.Join(k.scratch, "disk")
	if err := os.Mkdir(k.mountpoint, 0o700); err != nil {
		return nil, err
	}
	if k.disk, err = disk.StartPlain(c.FS.MinSize()); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, k.disk.Close()) }()

	began := time.Now()
	if _, err := k.once(ctx, nil); err != nil {
		return nil, err
	}
	k.whole = time.Since(began)
	tally = &Tally{}
	defer tally.Measure()()
	random := rand.New(rand.NewPCG(c.Seed, 0xc07))
	for n := range c.Times {
		// Behind the end, too: what is not synced then is still in memory.
		after := time.Duration(random.Float64() * 1.1 * float64(k.whole))
		result, err := k.cut(ctx, n, after)
		if err != nil {
			return nil, err
		}
		tally.Count(result, 0)
		if c.Until != nil && c.Until(result) {
			break
		}
	}
	return tally, nil
}

// received are marks that no log holds. An acknowledgement is received when its call
// has returned, however close to the cut: then it is a promise.
type received struct {
	mu    sync.Mutex
	marks []disk.Entry
}

func (h *received) Mark(text string) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.marks = append(h.marks, disk.Entry{Kind: disk.Mark, Text: text})
	return len(h.marks) - 1, nil
}

// once does the workload on a fresh file system. cut, when it is not nil, runs
// beside it and ends it. The file system stays mounted.
func (k *cutting) once(ctx context.Context, cut func(kill func() error) error) (_ *received, err error) {
	if err := k.disk.Unmount(); err != nil {
		return nil, err
	}
	if err := errors.Join(k.disk.Clear(disk.Range{Length: int64(len(k.disk.Image()))}), k.disk.DropCache()); err != nil {
		return nil, err
	}
	if err := k.disk.Format(k.FS); err != nil {
		return nil, err
	}
	if err := k.disk.Mount(k.FS, k.mountpoint); err != nil {
		return nil, err
	}
	daemon, err := k.Daemon.Launch(ctx, filepath.Join(k.mountpoint, rootName))
	if err != nil {
		return nil, err
	}
	killed := false
	kill := func() error {
		killed = true
		return daemon.Kill()
	}
	defer func() {
		if !killed {
			err = errors.Join(err, kill())
		}
	}()
	marks := &received{}
	runner := &workload.Runner{Snapshotter: daemon, Marks: marks, Plan: k.plan, Sync: k.Sync, Scratch: k.scratch}
	if cut == nil {
		k.record, err = runner.Run(ctx)
		return marks, err
	}
	done := make(chan error, 1)
	go func() { done <- cut(kill) }()
	// It fails at the cut, or is through before it.
	_, _ = runner.Run(ctx)
	return marks, <-done
}

// cut is one cut and the examination after it.
func (k *cutting) cut(ctx context.Context, n int, after time.Duration) (Result, error) {
	result := Result{ID: fmt.Sprintf("%s-%s-%d/%s.%d", k.Name, k.FS, k.Seed, k.Way, n), Points: 1}
	began := time.Now()
	marks, err := k.once(ctx, func(kill func() error) error {
		time.Sleep(after) // the moment is the point of it
		if k.Way == Shutdown {
			return disk.Shutdown(k.mountpoint)
		}
		return kill()
	})
	if err != nil {
		return result, err
	}
	if k.Way == Shutdown {
		if err := k.disk.Unmount(); err != nil {
			return result, err
		}
		if err := k.disk.Mount(k.FS, k.mountpoint); err != nil {
			result.Verdict, result.Reason = NotMeasured, err.Error()
			return result, nil
		}
	}
	expect := oracle.At(workload.Marks(marks.marks), len(marks.marks))
	examiner := oracle.Examiner{Subject: k.Subject, Plan: k.plan, Record: k.record, Scratch: k.scratch, Strict: k.Strict, SameBoot: k.Way == Kill}
	seen := examiner.Examine(ctx, filepath.Join(k.mountpoint, rootName), oracle.Extent{All: true, Again: true})
	result.weigh(oracle.Judge(&seen, expect, k.plan))
	result.Acked = expect.Promised()
	result.Took = time.Since(began)
	return result, nil
}

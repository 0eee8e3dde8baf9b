package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// Check examines cases of a recording.
type Check struct {
	Recording *Recording
	Cases     []state.Case
	// Subject recovers and answers, in each state.
	Subject func(worker int) oracle.Subject
	// Sample recovers and answers instead of Subject in every Every-th state:
	// the daemon among examinations in process. None when Every is 0.
	Sample func(worker int) oracle.Subject
	Every  int
	// Deep makes every Deep-th examination extract and mount everything, and Nested
	// cuts the recovery of one state in Nested again, of those in the middle: of the
	// first of a log, there is nothing to recover. Never when 0.
	Deep, Nested int
	Inner        int               // states of each such second cut, about; 40 when 0
	Strict       bool              // hold the subject to what only durable-snapshotter promises
	Workers      int               // examine side by side, each on a disk of its own; workers when 0
	Until        func(Result) bool // stops the check when it returns true; may be nil
	Each         func(Result)      // gets every result; may be nil
	// Keep gets the log of every recovery that is cut again, before it is: with
	// it, and with the first state, the second can be made again. May be nil.
	Keep func(first state.State, recovery []disk.Entry) error
	// Alone has each disk examined, also when the content of an earlier one was the same.
	Alone bool

	known contents
	next  atomic.Int64 // group of cases
}

// Run examines all cases. An error means that the check itself did not work.
func (c *Check) Run(ctx context.Context) (*Tally, error) {
	tally := &Tally{}
	defer tally.Measure()()
	err := SideBySide(ctx, c.Recording.ID(), len(c.Cases), c.workers(), func(ctx context.Context, n int, done *atomic.Bool) error {
		return c.work(ctx, n, tally, done)
	})
	return tally, err
}

// SideBySide calls work once for each worker, each in a goroutine, and waits for
// all of them. A worker that has seen enough, or an error, notifies the others by done.
func SideBySide(ctx context.Context, id string, cases, workers int, work func(ctx context.Context, n int, done *atomic.Bool) error) error {
	if cases == 0 {
		return fmt.Errorf("check %s: no cases: %w", id, ErrBroken)
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var (
		running sync.WaitGroup
		done    atomic.Bool
		errs    = make([]error, workers)
	)
	for n := range workers {
		running.Go(func() {
			if errs[n] = work(ctx, n, &done); errs[n] != nil {
				done.Store(true)
			}
		})
	}
	running.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("check %s: %w", id, err)
	}
	return nil
}

// worker has a disk of its own.
type worker struct {
	*Check
	number     int
	disk       *disk.Plain
	player     *state.Player
	recorder   *disk.Disk // for recoveries that are cut again, started at the first
	scratch    string
	mountpoint string
	tally      *Tally
	abandoned  int // disks
}

// group is how many neighbors one worker takes, at most: they share what is durable in them, and often
// all their content, which two workers would examine at the same time.
const group = 16

// work examines one group of cases after the other. The players of all workers go forward together.
func (c *Check) work(ctx context.Context, n int, tally *Tally, done *atomic.Bool) (err error) {
	w, err := c.newWorker(n, tally)
	defer func() { err = errors.Join(err, w.close()) }()
	if err != nil {
		return err
	}
	size := max(1, min(group, len(c.Cases)/c.workers()))
	for {
		first := int(c.next.Add(1)-1) * size
		if first >= len(c.Cases) {
			return nil
		}
		for i := first; i < min(first+size, len(c.Cases)); i++ {
			if done.Load() || ctx.Err() != nil {
				return ctx.Err()
			}
			if err := w.one(ctx, i, done); err != nil {
				return err
			}
		}
	}
}

// one examines case number i, and cuts its recovery again when it is time for that.
func (w *worker) one(ctx context.Context, i int, done *atomic.Bool) error {
	if err := w.player.Set(w.Cases[i].State); err != nil {
		return err
	}
	result, retried, err := w.judge(ctx, i, w.Cases[i])
	if err != nil {
		return err
	}
	if w.report(result, retried) {
		done.Store(true)
	}
	if w.Nested > 0 && i%w.Nested == w.Nested/2 && result.Verdict == Survived {
		return w.nested(ctx, w.Cases[i], done)
	}
	return nil
}

func (c *Check) newWorker(n int, tally *Tally) (w *worker, err error) {
	w = &worker{Check: c, number: n, tally: tally}
	if w.scratch, err = os.MkdirTemp("", "check"); err != nil {
		return w, err
	}
	w.mountpoint = filepath.Join(w.scratch, "disk")
	if err = os.Mkdir(w.mountpoint, 0o700); err != nil {
		return w, err
	}
	return w, w.newDisk()
}

func (w *worker) newDisk() (err error) {
	r := w.Recording
	if w.disk, err = disk.StartPlain(r.Base.Size); err != nil {
		return err
	}
	w.player, err = state.NewPlayer(w.disk, r.Base, r.Log)
	return err
}

// abandonedMost bounds the disks that a check may lose, each with its memory.
const abandonedMost = 50

// leave unmounts the disk after an examination. A snapshotter in this process that did
// not start may still hold its damaged database: bbolt does not let go of a file
// when it panics over it. A process would have ended; we take another disk.
func (w *worker) leave(seen *oracle.Observation) error {
	if seen.Start == nil {
		return w.disk.Unmount()
	}
	err := w.disk.UnmountWithin(time.Second)
	if !errors.Is(err, unix.EBUSY) {
		return err
	}
	if w.abandoned++; w.abandoned > abandonedMost {
		return fmt.Errorf("the snapshotter does not start in %d states, and holds their disks: %w", w.abandoned, seen.Start)
	}
	if err := w.disk.Abandon(); err != nil {
		return err
	}
	return w.newDisk()
}

func (w *worker) close() error {
	var errs []error
	if w.disk != nil {
		errs = append(errs, w.disk.Close())
	}
	if w.recorder != nil {
		errs = append(errs, w.recorder.Close())
	}
	if w.scratch != "" {
		errs = append(errs, os.RemoveAll(w.scratch))
	}
	return errors.Join(errs...)
}

// report counts a result and returns whether it is enough.
func (w *worker) report(r Result, retried int) bool {
	w.tally.add(r, retried)
	r.Retried = retried
	if w.Each != nil {
		w.Each(r)
	}
	return w.Until != nil && w.Until(r)
}

// sampled reports whether the sample is tested in case number i, beside those of Deep.
func (c *Check) sampled(i int) bool { return c.Every > 0 && i%c.Every == c.Every/3 }

// anyway is how often a disk is examined although the content of an earlier one was the same.
const anyway = 16

// workers is more than there are processors: an examination waits for its loop device, and a
// cut recovery for the process that records, more than it computes.
const workers = 4

func (c *Check) workers() int {
	if c.Workers == 0 {
		return workers
	}
	return c.Workers
}

// judge examines the disk as it is and judges it for all points of the case.
func (w *worker) judge(ctx context.Context, i int, c state.Case) (Result, int, error) {
	r := w.Recording
	result := Result{
		ID: r.ID() + "/" + c.State.String(), Path: state.Path{c.State}, Points: len(c.Points),
	}
	deep := w.Deep > 0 && i%w.Deep == 0
	extent := oracle.Extent{All: deep, Again: true}
	if w.sampled(i) {
		return w.examine(ctx, result, w.examiner(w.Sample(w.number)), extent, r.expects(c.Points), false)
	}
	return w.examine(ctx, result, w.examiner(w.Subject(w.number)), extent, r.expects(c.Points), !deep && i%anyway != anyway/2)
}

// examiner is what all examinations of states of the recording have in common.
func (w *worker) examiner(subject oracle.Subject) oracle.Examiner {
	r := w.Recording
	return oracle.Examiner{Subject: subject, Plan: r.Plan, Record: r.Record, Scratch: w.scratch, Strict: w.Strict, Generic: r.Generic}
}

// examine examines the disk as it is, completes the result with what it has seen,
// judged by every expectation, and counts what it has tried again. once: what was observed of the
// same content counts.
func (w *worker) examine(ctx context.Context, result Result, examiner oracle.Examiner, extent oracle.Extent, expects []oracle.Expect, once bool) (Result, int, error) {
	r := w.Recording
	began := time.Now()
	for _, e := range expects {
		extent.Retry = append(extent.Retry, r.retryAt(e)...)
	}
	if err := w.disk.Mount(r.FS, w.mountpoint, r.Options...); err != nil {
		result.Verdict, result.Reason = NotMeasured, err.Error()
		return result, 0, nil
	}
	var seen *oracle.Observation
	if root := filepath.Join(w.mountpoint, rootName); once && !w.Alone {
		seen, result.Same = w.observe(ctx, examiner, root, extent)
	} else {
		now := examiner.Examine(ctx, root, extent)
		seen = &now
	}
	if err := w.leave(seen); err != nil {
		return result, 0, err
	}
	result.Healing = seen.Healing
	for _, e := range expects {
		result.weigh(oracle.Judge(seen, e, r.Plan))
		result.Acked = e.Promised()
	}
	result.Took = time.Since(began)
	if result.Same {
		return result, 0, nil
	}
	return result, len(seen.Retried), nil
}

// expects returns what was promised at the points, each expectation once.
func (r *Recording) expects(points []int) []oracle.Expect {
	var out []oracle.Expect
	last := -1
	for _, p := range points {
		n, _ := slices.BinarySearchFunc(r.Marks, p, func(m workload.Mark, p int) int { return m.Index - p })
		if n != last {
			out = append(out, oracle.At(r.Marks, p))
		}
		last = n
	}
	return out
}

// weigh keeps the findings if they are worse than those so far.
func (r *Result) weigh(findings []oracle.Finding) {
	v := verdict(findings)
	if v > r.Verdict {
		r.Verdict, r.Findings = v, findings
	}
}

func verdict(findings []oracle.Finding) Verdict {
	switch oracle.Worst(findings) {
	case oracle.Lost:
		return Lost
	case oracle.Lie:
		return Lied
	case oracle.Flaw:
		return Flawed
	}
	return Survived
}

package campaign

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/full"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
)

// ErrInterrupted is returned by Run when its context ended before all states
// were examined. The campaign can be resumed.
var ErrInterrupted = errors.New("interrupted")

// campaign is one in progress.
type campaign struct {
	*Store
	bench    *lab.Bench
	progress io.Writer
	last     time.Time  // of a line of progress
	mu       sync.Mutex // guards last and err
	err      error      // of the store; ends the campaign
	found    bool       // a state that did not survive; guarded by the store's mutex
}

// Run begins or resumes the campaign in dir and returns its summary, also when
// it was interrupted.
func Run(ctx context.Context, dir string, o Options, resume bool, progress io.Writer) (_ *Summary, err error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	bench, err := lab.NewBench()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, bench.Close()) }()
	// Also the program itself: it recovers in its own process.
	tested, err := sumOf(bench.Ours, bench.Faulty, bench.Stock, "/proc/self/exe")
	if err != nil {
		return nil, err
	}
	store, err := Create(dir, o, tested, resume)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	c := &campaign{Store: store, bench: bench, progress: progress}
	err = c.gatesHold(ctx)
	store.began = time.Now() // the rate is that of examining states
	if err == nil {
		err = c.rounds(ctx)
	}
	if err != nil && !errors.Is(err, ErrInterrupted) {
		return nil, err
	}
	return c.Summary(), err
}

// enough reports whether the campaign is over.
func (c *campaign) enough(ctx context.Context) bool {
	c.Store.mu.Lock()
	defer c.Store.mu.Unlock()
	return ctx.Err() != nil || len(c.Lines) >= c.Options.States || c.Options.First && c.found
}

// receive takes in a result.
func (c *campaign) receive(r lab.Result) {
	n, err := c.result(r)
	if r.Verdict > lab.NotMeasured {
		c.Store.mu.Lock()
		c.found = true
		c.Store.mu.Unlock()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil && c.err == nil {
		c.err = err
	}
	if r.Verdict > lab.NotMeasured {
		fmt.Fprintln(c.progress, r)
	}
	if time.Since(c.last) > 10*time.Second {
		c.last = time.Now()
		fmt.Fprintf(c.progress, "%d of %d states; at %s\n", n, c.Options.States, r.ID)
	}
}

func (c *campaign) failed() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// rounds records and examines until it is enough.
func (c *campaign) rounds(ctx context.Context) (err error) {
	if c.enough(ctx) {
		return c.end(ctx)
	}
	var nodes *full.Bench // nil if there is no round of a whole node
	if c.Options.Workload == Full || c.Options.Workload == All {
		if nodes, err = full.NewBench(context.WithoutCancel(ctx), c.bench); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, nodes.Close()) }()
		if err := c.fullControl(ctx, nodes); err != nil {
			return err
		}
	}
	subject := c.subject()
	for round := 0; ; round++ {
		for _, fs := range c.Options.FS {
			if c.enough(ctx) {
				return c.end(ctx)
			}
			var err error
			if w, _ := c.Options.turn(round); w == Full {
				err = c.full(ctx, nodes, fs, round)
			} else {
				err = c.api(ctx, subject, fs, round)
			}
			if err != nil {
				return err
			}
		}
	}
}

// api is one recording of calls to the snapshotter, and its states.
func (c *campaign) api(ctx context.Context, s subject, fs disk.FS, round int) error {
	r, err := c.recording(ctx, s, fs, round)
	if err != nil {
		return err
	}
	w, _ := c.Options.turn(round)
	return c.check(ctx, s, r, c.share(w))
}

func (c *campaign) end(ctx context.Context) error {
	if ctx.Err() != nil {
		return ErrInterrupted
	}
	return c.failed()
}

// recording loads the recording of a round, or makes and keeps it.
func (c *campaign) recording(ctx context.Context, s subject, fs disk.FS, round int) (*lab.Recording, error) {
	w, turn := c.Options.turn(round)
	options, size := w.plan(fs, turn)
	setup := lab.Setup{
		FS: fs, Seed: c.Options.Seed + uint64(round), Options: options, Layers: size, Idle: true,
		Name: s.name, Generic: s.generic, Daemon: s.daemon("record"), Heal: w.heal(turn),
	}
	w.differ(&setup, turn)
	dir := c.RecordingDir((&lab.Recording{FS: fs, Seed: setup.Seed, Subject: s.name}).ID())
	r, err := lab.Load(dir)
	if err == nil || !errors.Is(err, os.ErrNotExist) {
		return r, err
	}
	// A call that is cut short by Ctrl-C would be taken for one that failed.
	if r, err = lab.Record(context.WithoutCancel(ctx), setup); err != nil {
		return nil, err
	}
	return r, r.Save(dir)
}

// check examines those of so many states of a recording that were not examined before.
func (c *campaign) check(ctx context.Context, s subject, r *lab.Recording, share int) error {
	cases := lab.Some(state.Enumerate(r.Log, state.Options{From: r.Start, Seed: r.Seed, Want: share}), share)
	var left []state.Case
	for _, k := range cases {
		if !c.isDone(r.ID() + "/" + k.State.String()) {
			left = append(left, k)
		}
	}
	if len(left) == 0 {
		return nil
	}
	check := lab.Check{
		Recording: r, Cases: left, Workers: s.workers, Strict: s.strict,
		Subject: s.recovers, Sample: s.sample, Every: s.every,
		Deep: 50, Nested: 150,
		Each:  c.receive,
		Until: func(lab.Result) bool { return c.enough(ctx) || c.failed() != nil },
		Keep: func(first state.State, recovery []disk.Entry) error {
			return lab.SaveLog(c.secondLog(r.ID(), first), recovery)
		},
	}
	if _, err := check.Run(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	return c.failed()
}

// WriteFile writes a file into the directory of the campaign.
func (s *Store) WriteFile(name string, text []byte) error {
	return os.WriteFile(filepath.Join(s.Dir, name), text, 0o644)
}

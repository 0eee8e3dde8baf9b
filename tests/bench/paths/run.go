package paths

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Options describe a run.
type Options struct {
	Snapshots []int // how many a node has
	Depths    []int // lengths of chains, at most 128
	Rounds    int
	Starts    int // of each kind
	FS        string
	Command   string // for the report
	Log       func(format string, args ...any)
}

// Run measures. It must be called within kit.Main. An error may come with what has been measured
// until then.
func Run(ctx context.Context, o Options) (*Report, error) {
	o.Log("build the daemon and containerd (minutes the first time)")
	bins, err := kit.Build(ctx)
	if err != nil {
		return nil, err
	}
	r := &Report{FS: o.FS, Rounds: o.Rounds}
	if r.Origin, err = published.Describe(ctx, bins, Schema, o.Command); err != nil {
		return nil, err
	}
	for _, layers := range slices.Sorted(slices.Values(o.Snapshots)) {
		if err := r.measure(ctx, o, bins, layers); err != nil {
			return r, fmt.Errorf("with %d snapshots: %w", layers, err)
		}
	}
	slices.SortStableFunc(r.Calls, func(a, b Call) int { return slices.Index(ops, a.Op) - slices.Index(ops, b.Op) })
	return r, nil
}

// ops is the order of calls in a table.
var ops = []string{"Stat", "Prepare", "View", "Mounts", "Usage", "Usage, active", "Commit, empty", "Remove", "Walk"}

func (r *Report) measure(ctx context.Context, o Options, bins kit.Binaries, layers int) (err error) {
	dir, err := os.MkdirTemp("", "paths-")
	if err != nil {
		return err
	}
	o.Log("fill a disk with %d snapshots", layers)
	n, err := newNode(ctx, dir, o.FS, bins, layers)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.close(), os.RemoveAll(dir)) }()
	if err := n.serve(ctx); err != nil {
		return err
	}
	for _, depth := range o.Depths {
		if parent := n.chain(depth); parent != "" {
			o.Log("%d snapshots: calls at depth %d", layers, depth)
			if err := r.cycles(ctx, n, o.Rounds, depth, parent); err != nil {
				return err
			}
		}
	}
	o.Log("%d snapshots: Walk", layers)
	if err := r.walks(ctx, n, max(3, o.Rounds/10)); err != nil {
		return err
	}
	if err := n.stop(); err != nil {
		return err
	}
	for _, unclean := range []bool{false, true} { // in this order: after it, not all are ready
		for i := range o.Starts {
			o.Log("%d snapshots: start %d of %d, unclean: %v", layers, i+1, o.Starts, unclean)
			if err := r.starts(ctx, n, unclean); err != nil {
				return err
			}
		}
	}
	return nil
}

// took adds what calls have taken to the report.
func (r *Report) took(n *node, depth int, op, variant string, seconds []float64) *Call {
	s := published.SpreadOf(seconds)
	sorted := slices.Sorted(slices.Values(seconds))
	r.Calls = append(r.Calls, Call{
		Snapshots: len(n.layers), Depth: depth, Op: op, Variant: variant, Count: len(seconds), Q1: s.Q1, Median: s.Median, Q3: s.Q3,
		P99: sorted[min(len(sorted)*99/100, len(sorted)-1)],
	})
	return &r.Calls[len(r.Calls)-1]
}

// cycles makes and removes snapshots on a parent, in turn with both.
func (r *Report) cycles(ctx context.Context, n *node, rounds, depth int, parent string) error {
	type key struct{ op, variant string }
	all := map[key][]float64{}
	for round := range rounds + rounds/10 + 1 {
		for i := range n.serving {
			s := n.serving[(round+i)%len(n.serving)]
			err := cycle(ctx, s.sn, round, parent, func(op string, took time.Duration) {
				if round > rounds/10 { // those before warm it up
					all[key{op, s.variant}] = append(all[key{op, s.variant}], took.Seconds())
				}
			})
			if err != nil {
				return fmt.Errorf("%s: %w", s.variant, err)
			}
		}
	}
	for _, op := range ops {
		for _, s := range n.serving {
			if times := all[key{op, s.variant}]; times != nil {
				r.took(n, depth, op, s.variant, times)
			}
		}
	}
	// What was removed is deleted outside of the calls that are measured.
	for _, s := range n.serving {
		if err := s.sn.(snapshots.Cleaner).Cleanup(ctx); err != nil {
			return fmt.Errorf("%s: %w", s.variant, err)
		}
	}
	return n.disk.Sync()
}

// cycle is what a pull, a container and the kubelet call.
func cycle(ctx context.Context, sn snapshots.Snapshotter, round int, parent string, took func(string, time.Duration)) error {
	timed := func(op string, call func() error) error {
		began := time.Now()
		err := call()
		took(op, time.Since(began))
		if err != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
		return nil
	}
	name := fmt.Sprintf("k8s.io/bench/sha256:%064x", round)
	key, view := "k8s.io/bench/extract-1-x "+name, fmt.Sprint("k8s.io/bench/view-", round)
	for _, step := range []struct {
		op    string
		times int
		call  func() error
	}{
		{"Stat", 5, func() error { _, err := sn.Stat(ctx, parent); return err }},
		{"Prepare", 1, func() error { _, err := sn.Prepare(ctx, key, parent); return err }},
		{"Mounts", 3, func() error { _, err := sn.Mounts(ctx, key); return err }},
		{"Usage, active", 1, func() error { _, err := sn.Usage(ctx, key); return err }},
		{"Commit, empty", 1, func() error { return sn.Commit(ctx, name, key) }},
		{"Usage", 3, func() error { _, err := sn.Usage(ctx, name); return err }},
		{"Remove", 1, func() error { return sn.Remove(ctx, name) }},
		{"View", 1, func() error { _, err := sn.View(ctx, view, parent); return err }},
		{"Remove", 1, func() error { return sn.Remove(ctx, view) }},
	} {
		for range step.times {
			if err := timed(step.op, step.call); err != nil {
				return err
			}
		}
	}
	return nil
}

// walks visits all snapshots, in turn with both.
func (r *Report) walks(ctx context.Context, n *node, rounds int) error {
	all, cpu := map[string][]float64{}, map[string]float64{}
	for round := range rounds + 1 {
		for i := range n.serving {
			s := n.serving[(round+i)%len(n.serving)]
			before, err := kit.ProcessorTime(s.process.PID())
			if err != nil {
				return err
			}
			rows, began := 0, time.Now()
			err = s.sn.Walk(ctx, func(context.Context, snapshots.Info) error { rows++; return nil })
			took := time.Since(began)
			if err == nil && rows != len(n.layers) {
				err = fmt.Errorf("%d rows, want %d", rows, len(n.layers))
			}
			if err != nil {
				return fmt.Errorf("%s: Walk: %w", s.variant, err)
			}
			after, err := kit.ProcessorTime(s.process.PID())
			if err != nil {
				return err
			}
			if round > 0 {
				all[s.variant] = append(all[s.variant], took.Seconds())
				cpu[s.variant] += (after - before) / float64(rounds)
			}
		}
	}
	for _, s := range n.serving {
		r.took(n, 0, "Walk", s.variant, all[s.variant]).CPU = cpu[s.variant]
	}
	return nil
}

// program is what both have, a kit.Daemon and a kit.Stock.
type program interface {
	Launch() error
	Snapshotter() (snapshots.Snapshotter, error)
	WaitReady(context.Context, time.Duration, func(context.Context) error) error
	Running() bool
	PID() int
	LogTail(int64) string
	Stop() error
	Kill() error
}

// starts measures one start of each, with nothing in memory. Unclean: the machine goes down
// under a daemon that has verified nothing since.
func (r *Report) starts(ctx context.Context, n *node, unclean bool) error {
	top := n.layers[n.deep+usual-1]
	for _, p := range []struct {
		variant, address string
		program
	}{{Durable, n.daemon.Address, n.daemon}, {Overlayfs, n.stock.Address, n.stock}} {
		if unclean {
			if err := p.Launch(); err != nil {
				return err
			}
			if err := p.WaitReady(ctx, 5*time.Minute, func(context.Context) error { return kit.Answers(p.address) }); err != nil {
				return err
			}
			if err := errors.Join(p.Kill(), os.Remove(p.address), kit.NewBoot()); err != nil {
				return err
			}
		}
		if err := n.disk.Cold(); err != nil {
			return err
		}
		s := Start{Snapshots: len(n.layers), Variant: p.variant, Unclean: unclean}
		began := time.Now()
		if err := p.Launch(); err != nil {
			return err
		}
		for kit.Answers(p.address) != nil {
			if !p.Running() || time.Since(began) > 5*time.Minute {
				return fmt.Errorf("%s does not answer: %s", p.variant, p.LogTail(4096))
			}
			time.Sleep(500 * time.Microsecond)
		}
		s.Socket = time.Since(began).Seconds()
		sn, err := p.Snapshotter()
		if err != nil {
			return err
		}
		began = time.Now()
		if _, err := sn.Stat(ctx, top); err != nil {
			return fmt.Errorf("%s: %w", p.variant, err)
		}
		s.Stat = time.Since(began).Seconds()
		if s.Memory, err = kit.Memory(p.PID(), "VmRSS"); err != nil {
			return err
		}
		if s.Private, err = kit.Memory(p.PID(), "RssAnon"); err != nil {
			return err
		}
		r.Starts = append(r.Starts, s)
		if err := errors.Join(sn.Close(), p.Stop()); err != nil {
			return err
		}
	}
	return nil
}

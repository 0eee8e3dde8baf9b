package lab

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// Place is a part of the disk that a fault concerns.
type Place string

// The places. Flush is none: the fault concerns cache flushes.
const (
	Data    Place = "data"
	Journal Place = "journal"
	Flush   Place = "flush"
)

// Failing is an experiment with a disk that fails: two layers are extracted side
// by side, the disk fails while they are written back, both are committed, and
// committed again when that failed. Whatever was acknowledged must be there
// after the power was cut.
type Failing struct {
	FS       disk.FS
	Seed     uint64
	Daemon   oracle.Process
	Name     string
	Place    Place
	Fault    disk.Fault // Op, Ranges are filled in from Place
	Differ   bool       // the daemon's own diff service extracts them
	Observed bool       // another process's sync meets the error before the first Commit
}

func (f Failing) String() string {
	observed := ""
	if f.Observed {
		observed = ", met by another first"
	}
	return fmt.Sprintf("%s: %s: %s%s", f.FS, f.Place, f.Fault, observed)
}

// Failed is what came of it.
type Failed struct {
	*Tally
	Hits  int // times the fault struck; at 0, there is no later request to fail
	Acked int // layers acknowledged
}

// Run does the experiment.
func (f Failing) Run(ctx context.Context) (_ *Failed, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("failing disk: %s: %w", f, err)
		}
	}()
	r := &Recording{FS: f.FS, Seed: f.Seed, Subject: f.Name, Record: workload.NewRecord()}
	if r.Plan, err = workload.NewPlan(f.Seed, workload.Size{Chains: 2, Layers: 1}); err != nil {
		return nil, err
	}
	d, err := newSite(f.FS, f.FS.MinSize())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if f.Fault.Op, f.Fault.Ranges, err = f.where(d.Disk); err != nil {
		return nil, err
	}
	if err := d.begin(r); err != nil {
		return nil, err
	}
	out := &Failed{}
	if err := f.work(ctx, r, d, out); err != nil {
		return nil, err
	}
	// The file system may have given up; it is not queried.
	_ = d.Unmount()
	check := Check{
		Recording: r, Cases: afterAcks(r), Workers: 1, Deep: 1,
		Subject: func(int) oracle.Subject { return oracle.InProcess{} },
	}
	out.Tally, err = check.Run(ctx)
	if err != nil {
		return nil, err
	}
	return out, nil
}

// where translates the place.
func (f Failing) where(d *disk.Disk) (disk.Op, []disk.Range, error) {
	if f.Place == Flush {
		return disk.OpFlush, nil, nil
	}
	ranges, err := d.Journal(f.FS)
	if err == nil && f.Place == Data {
		ranges = d.Outside(ranges)
	}
	return disk.OpWrite, ranges, err
}

// work is the experiment up to the cut.
func (f Failing) work(ctx context.Context, r *Recording, d *site, out *Failed) (err error) {
	ctx = namespaces.WithNamespace(ctx, "default")
	if f.Differ {
		if err := useStore(&f.Daemon, r.Plan, filepath.Join(d.scratch, "content")); err != nil {
			return err
		}
	}
	daemon, err := f.Daemon.Launch(ctx, filepath.Join(d.mountpoint, rootName))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, daemon.Kill()) }()
	runner := &workload.Runner{Snapshotter: daemon, Marks: d, Plan: r.Plan}
	observer, err := unix.Open(d.mountpoint, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(observer)

	var layers []*workload.Layer
	var keys []string
	var targets [][]mount.Mount
	for _, c := range r.Plan.Chains {
		l := c.Layers[0]
		key := l.Key("failing")
		mounts, err := runner.Prepare(ctx, key, "", l.Labels())
		if err != nil {
			return err
		}
		if f.Differ {
			r.Record.Trees[l.Name], err = l.Reference(ctx, d.scratch)
		} else if err = l.Extract(ctx, mounts, false); err == nil {
			r.Record.Trees[l.Name], err = workload.TreeOf(mounts)
		}
		if err != nil {
			return err
		}
		layers, keys, targets = append(layers, l), append(keys, key), append(targets, mounts)
	}
	if _, err := d.Inject(f.Fault); err != nil {
		return err
	}
	if f.Differ {
		for i, l := range layers {
			_ = l.Apply(ctx, daemon.Applier(), targets[i]) // it syncs, and may meet the fault
		}
	}
	if f.Observed {
		// It gets the error, or that the file system has given up on it.
		if err := unix.Syncfs(observer); err != nil && !errors.Is(err, f.Fault.Errno) && !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EIO) {
			return fmt.Errorf("the observer's sync: %w", err)
		}
	}
	// Errors are what is expected here; what is acknowledged all the same is
	// for the oracle.
	for range 2 {
		for i, l := range layers {
			if runner.Commit(ctx, l, keys[i]) == nil {
				out.Acked++
			}
		}
	}
	stats, err := d.Stats()
	if err != nil {
		return err
	}
	out.Hits = stats.Faults[0].Hits
	if err := d.Heal(); err != nil {
		return err
	}
	for i, l := range layers {
		if runner.Commit(ctx, l, keys[i]) == nil {
			out.Acked++
		}
	}
	return d.takeLog(r)
}

// afterAcks are the cases of an error experiment: nothing but what was flushed,
// and everything, right after each acknowledgement and at the end.
func afterAcks(r *Recording) []state.Case {
	points := []int{}
	for _, m := range r.Marks {
		if m.Op == workload.Commit && m.Phase == workload.Ack {
			points = append(points, m.Index+1)
		}
	}
	points = append(points, len(r.Log.Entries))
	var cases []state.Case
	for _, p := range points {
		for _, c := range []state.Class{state.Flushed, state.Prefix} {
			cases = append(cases, state.Case{State: state.State{Point: p, Class: c}, Points: []int{p}})
		}
	}
	return cases
}

// huntErrors fails the k-th data write, k = 0, 1, 2 …, met by the daemon itself
// or by another process before, until the defect shows or a pass is clean.
func (b *Bench) huntErrors(ctx context.Context, c *Catch, seed uint64) error {
	step := 1
	if c.Mutant.Name == "" {
		step = 8 // nothing will end it
	}
	for _, observed := range []bool{false, true} {
		for k := 0; !c.Caught; k += step {
			f := Failing{
				FS: c.FS, Seed: seed, Name: "mutant-" + c.Mutant.Name, Daemon: b.Mutation(c.Mutant, c.Mutant.who()), Differ: c.Mutant.Differs,
				Place: Data, Fault: disk.Fault{Skip: k, Times: 1, Errno: syscall.EIO}, Observed: observed,
			}
			failed, err := f.Run(ctx)
			if err != nil {
				return err
			}
			c.take(failed.Tally)
			if failed.Hits == 0 {
				break
			}
		}
	}
	return nil
}

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Heal makes a recording one of layers that are damaged before it begins, and
// heal: out of blobs in a content store on the same disk.
type Heal struct {
	Harm     workload.Harm // how much is damaged
	Gullible bool          // the subject may succeed for a layer that is not whole: a mutant
	// Fault is what the disk does to data while damaged layers heal; where is
	// filled in. Nothing else happens then, and whatever fails may fail.
	Fault *disk.Fault
}

// healing is a recording of that kind in the making.
type healing struct {
	Setup
	r      *Recording
	site   *site
	runner *workload.Runner
	daemon *oracle.Running   // that of run
	dirs   map[string]string // trees of the layers that are damaged
	fault  disk.Fault
}

func (h *healing) root() string { return filepath.Join(h.site.mountpoint, rootName) }

// before unpacks layers, damages them by hand, and leaves a disk that is
// unmounted in order: every state of the recording begins with that.
func (h *healing) before(ctx context.Context) (err error) {
	if err := h.site.Mount(h.FS, h.site.mountpoint, h.Options...); err != nil {
		return err
	}
	plan, content := h.r.Plan, filepath.Join(h.site.mountpoint, oracle.ContentName)
	if err := workload.WriteContent(ctx, content, h.site.scratch, plan.Old(), plan.Hopeless().Name); err != nil {
		return err
	}
	if err := kit.NewBoot(); err != nil {
		return err
	}
	h.runner = &workload.Runner{Marks: h.site, Plan: plan, Scratch: h.site.scratch, Gullible: h.Heal.Gullible}
	if err := h.run(ctx, func() (err error) {
		h.r.Record, h.dirs, err = h.runner.Unpack(ctx, h.bare())
		return err
	}, (*oracle.Running).Kill); err != nil {
		return err
	}
	if h.Heal.Harm == workload.Corruption {
		if err := h.digest(ctx); err != nil {
			return err
		}
	}
	if err := h.r.Record.Hurt(plan, h.dirs, h.Heal.Harm); err != nil {
		return err
	}
	if err := h.site.Unmount(); err != nil || h.Heal.Fault == nil {
		return err
	}
	h.fault = *h.Heal.Fault
	h.fault.Op, h.fault.Ranges, err = Failing{FS: h.FS, Place: Data}.where(h.site.Disk)
	return err
}

// bare reports whether the layers are without containers.
func (h *healing) bare() bool { return h.Heal.Harm == workload.Everything }

// digestsWithin bounds the wait for content digests, which the daemon takes every
// 15 seconds.
const digestsWithin = 3 * time.Minute

// digest waits until the daemon has content digests of all layers in its journal:
// a layer without a blob can be compared with nothing else. It was killed before,
// and is killed after, so the next boot is an unclean one.
func (h *healing) digest(ctx context.Context) error {
	ctx, stop := context.WithTimeout(ctx, digestsWithin)
	defer stop()
	if err := h.run(ctx, func() error {
		for {
			report, err := h.daemon.Report(ctx)
			if err != nil {
				return err
			}
			if !slices.ContainsFunc(report.Layers, func(l verify.Result) bool { return l.Contents == "" }) {
				return nil
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("a layer has no content digests: %w", ctx.Err())
			case <-time.After(100 * time.Millisecond):
			}
		}
	}, (*oracle.Running).Close); err != nil {
		return err
	}
	return h.run(ctx, func() error { return nil }, (*oracle.Running).Kill)
}

// verify has the content of the corrupt layers compared, and what can be healed
// healed. From its answer on, all of it is promised.
func (h *healing) verify(ctx context.Context) error {
	var o layers.RepairOptions
	o.Apply, o.Deep = true, true
	for _, name := range h.r.Record.Corrupt {
		id, err := strconv.ParseUint(filepath.Base(filepath.Dir(h.dirs[name])), 10, 64)
		if err != nil {
			return fmt.Errorf("number of %q: %w", name, err)
		}
		o.IDs = append(o.IDs, id)
		if err := h.markVerify(workload.Begin, name); err != nil {
			return err
		}
	}
	results, err := h.daemon.Repair(ctx, o)
	if err != nil {
		return err
	}
	for _, name := range h.r.Record.Corrupt {
		i := slices.IndexFunc(results, func(r layers.RepairResult) bool { return r.Name == name })
		hopeless := slices.Contains(h.r.Record.Hopeless, name)
		switch {
		case i >= 0 && results[i].Healed != hopeless:
			if err := h.markVerify(workload.Ack, name); err != nil {
				return err
			}
		case h.Heal.Gullible:
		default:
			return fmt.Errorf("content of %q was compared, it is corrupt, and it has a blob: %t; found was only %+v", name, !hopeless, results)
		}
	}
	return nil
}

func (h *healing) markVerify(phase workload.Phase, name string) error {
	_, err := h.site.Mark(workload.Mark{Phase: phase, Op: workload.Verify, Name: name}.Text())
	return err
}

// less has the corrupt layer that cannot be healed verified by its metadata only,
// which finds nothing, and queries it: it must be refused still.
func (h *healing) less(ctx context.Context) error {
	if _, err := h.daemon.Repair(ctx, layers.RepairOptions{Apply: true}); err != nil {
		return err
	}
	return h.runner.QueryHopeless(ctx, "hopeless-still")
}

// run starts the daemon, does something, and ends it.
func (h *healing) run(ctx context.Context, do func() error, end func(*oracle.Running) error) error {
	daemon, err := h.Daemon.Launch(ctx, h.root())
	if err != nil {
		return err
	}
	h.runner.Snapshotter, h.daemon = daemon, daemon
	if err := do(); err != nil {
		return errors.Join(err, daemon.Kill())
	}
	return end(daemon)
}

// work is what is recorded: an unclean shutdown, a clean stop in the middle of the
// healing, a clean boot, everything, a clean stop, and a start in the same boot.
// After a clean stop nothing is verified, so what was reported whole must be on disk.
func (h *healing) work(ctx context.Context) error {
	if h.Heal.Fault != nil {
		return h.fail(ctx)
	}
	nothing := func(context.Context) error { return nil }
	first, second := nothing, nothing
	if h.Heal.Harm == workload.Corruption {
		first, second = h.verify, h.less
	}
	for _, phase := range []struct {
		newBoot bool
		do      []func(context.Context) error
		end     func(*oracle.Running) error
	}{
		{true, []func(context.Context) error{first, h.runner.QueryOne}, (*oracle.Running).Close},
		{true, []func(context.Context) error{h.heal, second}, (*oracle.Running).Close},
		{false, []func(context.Context) error{h.runner.QueryAgain}, (*oracle.Running).Kill},
	} {
		if phase.newBoot {
			if err := kit.NewBoot(); err != nil {
				return err
			}
		}
		if err := h.run(ctx, func() error {
			for _, do := range phase.do {
				if err := do(ctx); err != nil {
					return err
				}
			}
			return h.reports()
		}, phase.end); err != nil {
			return err
		}
		if err := workload.Others(h.site.mountpoint); err != nil {
			return err
		}
	}
	if left, err := os.ReadDir(filepath.Join(h.root(), "healing")); !h.Heal.Gullible && (err != nil || len(left) > 0) {
		return fmt.Errorf("left in healing/: %v, %w", left, err)
	}
	return h.site.takeLog(h.r)
}

func (h *healing) heal(ctx context.Context) error { return h.runner.Heal(ctx, h.root(), h.dirs) }

// reports checks what the daemon has reported about layers that have a good blob.
func (h *healing) reports() error {
	names, err := h.daemon.NoBlob()
	if err != nil || h.Heal.Gullible {
		return err
	}
	for _, name := range names {
		if h.r.Record.Damaged[name] != "" && !slices.Contains(h.r.Record.Hopeless, name) {
			return fmt.Errorf("%q was reported as without a good blob, and its blob is good: its image would be dropped", name)
		}
	}
	return nil
}

// fail is recorded when the disk is to fail: an unclean shutdown, queries that
// make layers heal, and a stop in order. Then nothing is verified at the next boot.
func (h *healing) fail(ctx context.Context) error {
	if err := kit.NewBoot(); err != nil {
		return err
	}
	if err := h.run(ctx, func() error {
		if _, err := h.site.Inject(h.fault); err != nil {
			return err
		}
		h.runner.QueryAll(ctx)
		return nil
	}, func(r *oracle.Running) error {
		_ = r.Close() // it may return that it could not note that it has stopped
		return nil
	}); err != nil {
		return err
	}
	_ = workload.Others(h.site.mountpoint) // the file system may have given up
	return h.site.takeLog(h.r)
}

// HealFailing has the disk fail one write after another, the first skip of them
// left out, while damaged layers heal, and cuts the power in a few states behind
// it. hits is 0 when there was no later write to fail.
func (b *Bench) HealFailing(ctx context.Context, daemon oracle.Process, fs disk.FS, seed uint64, skip int) (tally *Tally, hits int, err error) {
	r, err := Record(ctx, Setup{
		FS: fs, Seed: seed, Name: fmt.Sprintf("heal-failing-%d", skip), Layers: workload.HealingAlone, Daemon: daemon,
		Heal: &Heal{Gullible: true, Fault: &disk.Fault{Skip: skip, Times: 1, Errno: syscall.EIO}},
	})
	if err != nil {
		return nil, 0, err
	}
	check := Check{
		Recording: r, Deep: 4, Strict: true,
		Cases:   append(Some(state.Enumerate(r.Log, state.Options{From: r.Start, Seed: seed}), 4), atEnd(r)...),
		Subject: func(int) oracle.Subject { return oracle.InProcess{} },
	}
	tally, err = check.Run(ctx)
	return tally, r.Stats.Faults[0].Hits, err
}

// atEnd are the cases of the last point: everything, and what was flushed.
func atEnd(r *Recording) (cases []state.Case) {
	p := len(r.Log.Entries)
	for _, c := range []state.Class{state.Flushed, state.Prefix} {
		cases = append(cases, state.Case{State: state.State{Point: p, Class: c}, Points: []int{p}})
	}
	return cases
}

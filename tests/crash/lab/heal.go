package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Heal makes a recording one of layers that are damaged before it begins, and
// heal: out of blobs in a content store on the same disk.
type Heal struct {
	Everything bool // snapshots/ was removed, instead of a wound here and there
	Gullible   bool // the subject may say yes about a layer that is not whole: a mutant
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
		h.r.Record, h.dirs, err = h.runner.Unpack(ctx, h.Heal.Everything)
		return err
	}, (*oracle.Running).Kill); err != nil {
		return err
	}
	if err := h.r.Record.Hurt(plan, h.dirs, h.Heal.Everything); err != nil {
		return err
	}
	if err := h.site.Unmount(); err != nil || h.Heal.Fault == nil {
		return err
	}
	h.fault = *h.Heal.Fault
	h.fault.Op, h.fault.Ranges, err = Failing{FS: h.FS, Place: Data}.where(h.site.Disk)
	return err
}

// run starts the daemon, does something, and ends it.
func (h *healing) run(ctx context.Context, do func() error, end func(*oracle.Running) error) error {
	daemon, err := h.Daemon.Launch(ctx, h.root())
	if err != nil {
		return err
	}
	h.runner.Snapshotter = daemon
	if err := do(); err != nil {
		return errors.Join(err, daemon.Kill())
	}
	return end(daemon)
}

// work is what is recorded: an unclean boot, a clean stop in the middle of the
// healing, a clean boot, everything, a clean stop, and a start in the same boot.
// After a clean stop nobody looks, so what was said to be whole must be on disk.
func (h *healing) work(ctx context.Context) error {
	if h.Heal.Fault != nil {
		return h.fail(ctx)
	}
	for _, phase := range []struct {
		newBoot bool
		do      func() error
		end     func(*oracle.Running) error
	}{
		{true, func() error { return h.runner.AskOne(ctx) }, (*oracle.Running).Close},
		{true, func() error { return h.runner.Heal(ctx, h.root(), h.dirs) }, (*oracle.Running).Close},
		{false, func() error { return h.runner.AskAgain(ctx) }, (*oracle.Running).Kill},
	} {
		if phase.newBoot {
			if err := kit.NewBoot(); err != nil {
				return err
			}
		}
		if err := h.run(ctx, phase.do, phase.end); err != nil {
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

// fail is recorded when the disk is to fail: an unclean boot, questions that
// make layers heal, and a stop in order. Then nobody looks at the next boot.
func (h *healing) fail(ctx context.Context) error {
	if err := kit.NewBoot(); err != nil {
		return err
	}
	if err := h.run(ctx, func() error {
		if _, err := h.site.Inject(h.fault); err != nil {
			return err
		}
		h.runner.AskAll(ctx)
		return nil
	}, func(r *oracle.Running) error {
		_ = r.Close() // it may say that it could not note that it has stopped
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

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// Heal makes a recording one of layers that are damaged before it begins, and
// heal: out of blobs in a content store on the same disk.
type Heal struct {
	Everything bool // snapshots/ was removed, instead of a wound here and there
	Gullible   bool // the subject may say yes about a layer that is not whole: a mutant
}

// healing is a recording of that kind in the making.
type healing struct {
	Setup
	r                   *Recording
	disk                *disk.Disk
	runner              *workload.Runner
	mountpoint, scratch string
	dirs                map[string]string // trees of the layers that are damaged
}

func (h *healing) root() string { return filepath.Join(h.mountpoint, rootName) }

// before unpacks layers, damages them by hand, and leaves a disk that is
// unmounted in order: every state of the recording begins with that.
func (h *healing) before(ctx context.Context) (err error) {
	if err := h.disk.Mount(h.FS, h.mountpoint, h.Options...); err != nil {
		return err
	}
	plan, content := h.r.Plan, filepath.Join(h.mountpoint, oracle.ContentName)
	if err := workload.WriteContent(ctx, content, h.scratch, plan.Old(), plan.Hopeless().Name); err != nil {
		return err
	}
	if err := oracle.NewBoot(); err != nil {
		return err
	}
	h.runner = &workload.Runner{Marks: h.disk, Plan: plan, Scratch: h.scratch, Gullible: h.Heal.Gullible}
	if err := h.run(ctx, func() (err error) {
		h.r.Record, h.dirs, err = h.runner.Unpack(ctx, h.Heal.Everything)
		return err
	}, (*oracle.Running).Kill); err != nil {
		return err
	}
	if err := h.r.Record.Hurt(plan, h.dirs, h.Heal.Everything); err != nil {
		return err
	}
	return h.disk.Unmount()
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
			if err := oracle.NewBoot(); err != nil {
				return err
			}
		}
		if err := h.run(ctx, phase.do, phase.end); err != nil {
			return err
		}
		if err := workload.Others(h.mountpoint); err != nil {
			return err
		}
	}
	if left, err := os.ReadDir(filepath.Join(h.root(), "healing")); !h.Heal.Gullible && (err != nil || len(left) > 0) {
		return fmt.Errorf("left in healing/: %v, %w", left, err)
	}
	entries, err := h.disk.Log(0)
	if err != nil {
		return err
	}
	h.r.Log, h.r.Marks = state.NewLog(entries), workload.Marks(entries)
	return nil
}

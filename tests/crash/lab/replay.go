package lab

import (
	"context"
	"errors"
	"fmt"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// Replay makes one state again.
type Replay struct {
	Recording *Recording
	Path      state.Path
	Recovery  []disk.Entry // what the first recovery wrote, for a path of two states
	Subject   oracle.Subject
	Strict    bool
}

// Run examines the state as a Check does. Then it makes the state once more,
// mounts it, and calls hold, if that is not nil, with the mount point: there
// nothing is recovered yet, but for the file system itself.
func (r *Replay) Run(ctx context.Context, hold func(result Result, mountpoint string) error) (result Result, err error) {
	if len(r.Path) == 0 || len(r.Path) > 2 || (len(r.Path) == 2) != (r.Recovery != nil) {
		return result, fmt.Errorf("replay %s/%s: a state, or two and the log in between", r.Recording.ID(), r.Path)
	}
	check := &Check{
		Recording: r.Recording, Strict: r.Strict, Deep: 1,
		Subject: func(int) oracle.Subject { return r.Subject },
	}
	w, err := check.newWorker(0, &Tally{})
	defer func() { err = errors.Join(err, w.close()) }()
	if err != nil {
		return result, err
	}
	first, err := state.CaseOf(r.Recording.Log, r.Path[0], r.Recording.Start)
	if err != nil {
		return result, err
	}
	again := func() error { return w.player.Set(first.State) }
	if err := again(); err != nil {
		return result, err
	}
	if len(r.Path) == 1 {
		result, _, err = w.judge(ctx, 0, first)
	} else {
		var base *state.Image
		if base, err = state.ReadImage(w.disk); err != nil {
			return result, err
		}
		inner := &innerCheck{
			worker: w, outer: first, base: base, log: state.NewLog(r.Recovery),
			expect: oracle.At(r.Recording.Marks, first.Points[len(first.Points)-1]),
		}
		var second state.Case
		if second, err = state.CaseOf(inner.log, r.Path[1], 0); err != nil {
			return result, err
		}
		again = func() error {
			player, err := state.NewPlayer(w.disk, inner.base, inner.log)
			if err != nil {
				return err
			}
			return player.Set(second.State)
		}
		if err := again(); err != nil {
			return result, err
		}
		result, _, err = inner.judge(ctx, second, workload.Marks(r.Recovery))
	}
	if err != nil || hold == nil {
		return result, err
	}
	if err := again(); err != nil {
		return result, err
	}
	if err := w.disk.Mount(r.Recording.FS, w.mountpoint, r.Recording.Options...); err != nil {
		return result, err
	}
	return result, hold(result, w.mountpoint)
}

package lab

import (
	"cmp"
	"context"
	"path/filepath"
	"sync/atomic"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// innerCheck cuts the power a second time, while the snapshotter recovers from
// the first cut and does what was left to do. What it has reported in between
// was promised, and must be there after the second cut.
type innerCheck struct {
	*worker
	outer  state.Case
	base   *state.Image
	log    *state.Log
	expect oracle.Expect // at the first cut
}

// nested records what happens to the disk after the power came back, and cuts
// that again.
func (w *worker) nested(ctx context.Context, outer state.Case, done *atomic.Bool) (err error) {
	r := w.Recording
	if w.recorder == nil {
		if w.recorder, err = disk.Start(r.Base.Size); err != nil {
			return err
		}
	}
	d := w.recorder
	player, err := state.NewPlayer(d, r.Base, r.Log)
	if err != nil {
		return err
	}
	if err := player.Set(outer.State); err != nil {
		return err
	}
	base, err := state.ReadImage(d)
	if err != nil {
		return err
	}
	if err := d.Reset(); err != nil {
		return err
	}
	if err := d.Mount(r.FS, w.mountpoint, r.Options...); err != nil {
		return err
	}
	last := oracle.At(r.Marks, outer.Points[len(outer.Points)-1])
	examiner := w.examiner(w.Subject(w.number))
	examiner.Marks = d
	_ = examiner.Examine(ctx, filepath.Join(w.mountpoint, rootName), oracle.Extent{Retry: r.retryAt(last)})
	if err := d.Unmount(); err != nil {
		return err
	}
	entries, err := d.Log(0)
	if err != nil {
		return err
	}
	if w.Keep != nil {
		if err := w.Keep(outer.State, entries); err != nil {
			return err
		}
	}
	inner := &innerCheck{worker: w, outer: outer, base: base, log: state.NewLog(entries), expect: last}
	return inner.run(ctx, done)
}

// innerWant bounds the states of one recovery, when the check does not.
const innerWant = 40

func (n *innerCheck) run(ctx context.Context, done *atomic.Bool) error {
	var player *state.Player
	var on *disk.Plain
	marks := workload.Marks(n.log.Entries)
	want := cmp.Or(n.Inner, innerWant)
	cases := state.Enumerate(n.log, state.Options{Seed: uint64(n.outer.State.Point), Want: want})
	// prefix is made at every point: of a long recovery, an even part of it.
	step := max(1, len(cases)/want)
	for i := 0; i < len(cases) && !done.Load(); i += step {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if on != n.disk { // the first, or the one before was abandoned
			var err error
			if player, err = state.NewPlayer(n.disk, n.base, n.log); err != nil {
				return err
			}
			on = n.disk
		}
		if err := player.Set(cases[i].State); err != nil {
			return err
		}
		result, retried, err := n.judge(ctx, cases[i], marks)
		if err != nil {
			return err
		}
		if n.report(result, retried) {
			done.Store(true)
		}
	}
	n.player.Forget()
	return nil
}

func (n *innerCheck) judge(ctx context.Context, c state.Case, marks []workload.Mark) (Result, int, error) {
	r := n.Recording
	path := state.Path{n.outer.State, c.State}
	result := Result{ID: r.ID() + "/" + path.String(), Path: path, Points: len(c.Points)}
	var expects []oracle.Expect
	for _, p := range c.Points {
		expects = append(expects, n.expect.After(marks, p))
	}
	examiner := n.examiner(n.Subject(n.number))
	examiner.Tag = "-second"
	return n.examine(ctx, result, examiner, oracle.Extent{}, expects, true)
}

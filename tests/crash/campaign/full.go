package campaign

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/full"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
)

// full is one recording of a whole node, and its states.
func (c *campaign) full(ctx context.Context, b *full.Bench, fs disk.FS, round int) error {
	r, err := c.fullRecording(ctx, b, fs, round)
	if err != nil {
		return err
	}
	return c.fullCheck(ctx, r)
}

// fullControl boots the same node with the built-in overlayfs, on each file
// system, until an image is lost.
func (c *campaign) fullControl(ctx context.Context, b *full.Bench) error {
	for _, fs := range c.Options.FS {
		if err := c.try(ctx, gateControl, "overlayfs in containerd", fs, func(ctx context.Context) (*lab.Catch, error) {
			catch := &lab.Catch{FS: fs, Mutant: lab.Mutant{Name: "overlayfs", By: lab.ByPower, Mistake: "containerd's own, as it is by default"}}
			r, err := b.Record(ctx, full.Setup{FS: fs, Seed: c.Options.Seed, Name: "stock"})
			if err != nil {
				return nil, err
			}
			lost := func(r lab.Result) bool { return oracle.Has(r.Findings, oracle.Lost) }
			check := full.Check{Recording: r, Cases: r.Choose(40), Until: lost}
			tally, err := check.Run(ctx)
			if err != nil {
				return nil, err
			}
			catch.States, catch.Took = tally.States, tally.Elapsed
			for _, res := range tally.Bad {
				if lost(res) {
					catch.Caught, catch.First = true, res
				}
			}
			return catch, nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// fullRecording loads the recording of a round, or makes and keeps it. They are orderly,
// interrupted, of a node with damaged layers, and of pulls by the CRI plugin, in turn.
func (c *campaign) fullRecording(ctx context.Context, b *full.Bench, fs disk.FS, round int) (*full.Recording, error) {
	s := full.Setup{FS: fs, Seed: c.Options.Seed + uint64(round), Daemon: c.ours("record")}
	_, turn := c.Options.turn(round)
	switch turn % 4 {
	case 0:
		s.Name = "orderly"
	case 1:
		s.Name, s.Interrupted = "interrupted", true
	case 2:
		s.Name, s.Damage = "damaged", full.Damaged
	case 3:
		s.Name = full.ByCRI
	}
	dir := c.RecordingDir((&lab.Recording{FS: fs, Seed: s.Seed, Subject: s.Name}).ID())
	kept, err := lab.Load(dir)
	if err == nil {
		return b.Adopt(kept), nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	r, err := b.Record(context.WithoutCancel(ctx), s)
	if err != nil {
		return nil, err
	}
	return r, r.Save(dir)
}

func (c *campaign) fullCheck(ctx context.Context, r *full.Recording) error {
	var left []state.Case
	for _, k := range r.Choose(c.share(Full)) {
		if !c.isDone(r.ID() + "/" + k.State.String()) {
			left = append(left, k)
		}
	}
	if len(left) == 0 {
		return nil
	}
	check := full.Check{
		Recording: r, Cases: left, Workers: 2,
		Subject: func(n int) oracle.Process { return c.ours(fmt.Sprintf("boot-%d", n)) },
		Each:    c.receive,
		Until:   func(lab.Result) bool { return c.enough(ctx) || c.failed() != nil },
	}
	tally, err := check.Run(context.WithoutCancel(ctx))
	if err != nil {
		return err
	}
	if err := c.gate(Gate{Kind: noteContainerd, Name: r.ID(), Finding: tally.Counts.String(), States: tally.States}); err != nil {
		return err
	}
	return c.failed()
}

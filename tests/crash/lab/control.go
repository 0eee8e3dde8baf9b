package lab

import (
	"context"
	"fmt"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
)

// controlStates bounds a control: when so many states of the built-in overlayfs
// are examined and no layer is lost, something is wrong with the harness.
const controlStates = 40

// Control does to containerd's built-in overlayfs what is done to ours, until a
// layer is lost. One that loses nothing is an error that wraps ErrBroken.
func (b *Bench) Control(ctx context.Context, fs disk.FS, seed uint64) (*Catch, error) {
	c := &Catch{Mutant: Mutant{Name: "overlayfs", By: ByPower, Mistake: "containerd's own, as it is by default"}, FS: fs}
	return c, b.control(ctx, c, Setup{FS: fs, Seed: seed, Name: "overlayfs", Daemon: b.StockDaemon("overlayfs-" + string(fs))})
}

func (b *Bench) control(ctx context.Context, c *Catch, s Setup) error {
	r, err := Record(ctx, s)
	if err != nil {
		return err
	}
	tally, err := b.checkControl(ctx, r, controlStates, func(res Result) bool { return oracle.Has(res.Findings, oracle.Lost) })
	if err != nil {
		return err
	}
	c.Took = tally.Elapsed
	for _, res := range tally.Bad {
		if oracle.Has(res.Findings, oracle.Lost) {
			c.Caught, c.First = true, res
		}
	}
	c.States = tally.States
	if !c.Caught {
		return fmt.Errorf("control: %s on %s lost nothing in %d states: %w", s.Name, s.FS, tally.States, ErrBroken)
	}
	return nil
}

// ControlWithSync is the built-in overlayfs with containerd's own sync, one
// syncfs at the end of each extraction, in n states. It is expected to lose
// nothing to a power cut: that proves that the harness does not find what is not
// there.
func (b *Bench) ControlWithSync(ctx context.Context, fs disk.FS, seed uint64, n int) (*Tally, error) {
	r, err := Record(ctx, Setup{FS: fs, Seed: seed, Name: "overlayfs-sync", Sync: true, Daemon: b.StockDaemon("overlayfs-sync-" + string(fs))})
	if err != nil {
		return nil, err
	}
	return b.checkControl(ctx, r, n, nil)
}

func (b *Bench) checkControl(ctx context.Context, r *Recording, n int, until func(Result) bool) (*Tally, error) {
	check := Check{
		Recording: r,
		Cases:     Some(stride(state.Enumerate(r.Log, state.Options{From: r.Start, Seed: r.Seed, Want: n})), n),
		Subject:   func(n int) oracle.Subject { return b.StockDaemon(fmt.Sprintf("%s-%d", r.ID(), n)) },
		Until:     until,
	}
	return check.Run(ctx)
}

// Some returns an even part of the cases, at most n.
func Some(cases []state.Case, n int) []state.Case {
	if len(cases) <= n {
		return cases
	}
	out := make([]state.Case, 0, n)
	for i := range n {
		out = append(out, cases[i*len(cases)/n])
	}
	return out
}

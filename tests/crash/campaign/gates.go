package campaign

import (
	"context"
	"fmt"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
)

// gatesHold shows that the harness finds what there is to find, and nothing
// else. A campaign that is resumed does not do it twice.
func (c *campaign) gatesHold(ctx context.Context) error {
	for _, fs := range c.Options.FS {
		if err := c.try(ctx, gateControl, "overlayfs", fs, func(ctx context.Context) (*lab.Catch, error) {
			return c.bench.Control(ctx, fs, c.Options.Seed)
		}); err != nil {
			return err
		}
	}
	if c.Options.Foreign != nil {
		return nil // its defects are what the campaign searches for
	}
	for _, m := range lab.Mutants() {
		if err := c.hunt(ctx, gateMutant, m); err != nil {
			return err
		}
	}
	for _, m := range lab.NoMutants() {
		if err := c.hunt(ctx, gateNone, m); err != nil {
			return err
		}
	}
	return nil
}

func (c *campaign) hunt(ctx context.Context, kind string, m lab.Mutant) error {
	name := m.Name
	if name == "" {
		name = m.Mistake
	}
	return c.try(ctx, kind, name, m.FS, func(ctx context.Context) (*lab.Catch, error) {
		catch, err := c.bench.Hunt(ctx, m, c.Options.Seed)
		return &catch, err
	})
}

// try goes through one gate, if that was not done before.
func (c *campaign) try(ctx context.Context, kind, name string, fs disk.FS, hunt func(context.Context) (*lab.Catch, error)) error {
	if fs == "" {
		fs = disk.Ext4
	}
	for _, g := range c.Gates {
		if g.Kind == kind && g.Name == name && g.FS == string(fs) {
			return nil
		}
	}
	if ctx.Err() != nil {
		return ErrInterrupted
	}
	catch, err := hunt(context.WithoutCancel(ctx))
	if err != nil {
		return err
	}
	g := Gate{
		Kind: kind, Name: name, Mistake: catch.Mutant.Mistake, By: string(catch.Mutant.By), FS: string(catch.FS),
		Caught: catch.Caught, States: catch.States, Seconds: catch.Took.Seconds(),
	}
	if catch.Caught {
		g.First = catch.First.ID
		g.Finding, _, _ = strings.Cut(catch.First.Findings[0].String(), "\n")
		g.Finding = strings.TrimSuffix(g.Finding, ":")
	}
	fmt.Fprintf(c.progress, "%s %s on %s: caught: %v, in %d states\n", kind, name, fs, g.Caught, g.States)
	return c.gate(g)
}

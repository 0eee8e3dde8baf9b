package main

import (
	"cmp"
	"fmt"
	"text/tabwriter"

	"github.com/durable-snapshotter/durable-snapshotter/internal/admin"
	"github.com/durable-snapshotter/durable-snapshotter/internal/images"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/rebuild"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

// repair prints what can be done about layers that are not ready, and does it
// with --apply. With --rebuild it is about metadata.db, with --images about images of
// containerd.
func repair(c *command) error {
	rebuild := c.flags.Bool("rebuild", false, "")
	apply := c.flags.Bool("apply", false, "")
	deep := c.flags.Bool("deep", false, "")
	orphans := c.flags.Bool("orphans", false, "")
	ofImages := c.flags.Bool("images", false, "")
	namespace := c.flags.String("namespace", "", "")
	force := c.flags.Bool("force", false, "")
	asJSON := c.flags.Bool("json", false, "")
	names, err := c.parse()
	if err != nil {
		return err
	}
	if *orphans && (*rebuild || *deep || len(names) > 0) {
		return fmt.Errorf("--orphans goes with no snapshot, and not with --rebuild or --deep: %w", errUsage)
	}
	if *rebuild && (*apply || *deep || len(names) > 0) {
		return fmt.Errorf("--rebuild goes with no snapshot, and not with --apply or --deep: %w", errUsage)
	}
	if *ofImages && (*orphans || *rebuild) || !*ofImages && (*force || *namespace != "") {
		return fmt.Errorf("--images does not go with --orphans or --rebuild, and --force and --namespace only with --images: %w", errUsage)
	}
	cfg, err := c.config()
	if err != nil {
		return err
	}
	switch {
	case *ofImages:
		return c.repairImages(cfg, images.Options{Namespaces: listOf(*namespace), Names: names, Deep: *deep}, *apply, *force, *asJSON)
	case *rebuild:
		return c.rebuild(cfg, *asJSON)
	case *orphans:
		return c.orphans(cfg, *apply, *asJSON)
	}
	results, err := c.heal(cfg, names, layers.RepairOptions{Apply: *apply, Deep: *deep})
	if err != nil {
		return err
	}
	if *asJSON {
		err = c.printJSON(results)
	} else {
		err = c.printRepair(results, *apply)
	}
	if err != nil {
		return err
	}
	left := make([]verify.Result, len(results))
	for i, r := range results {
		left[i] = r.Result
	}
	return verdict(left)
}

// heal lets a running daemon do it, and does it itself when none is running. Without names
// it is about all snapshots.
func (c *command) heal(cfg Config, names []string, o layers.RepairOptions) (results []layers.RepairResult, err error) {
	report, _, err := c.report(cfg)
	if err != nil {
		return nil, err
	}
	if !o.Apply {
		c.warnBrake(report)
	}
	if o.IDs, err = idsOf(report, names); err != nil {
		return nil, err
	}
	return c.healIDs(cfg, o)
}

// healIDs is heal for snapshots that are known by their numbers.
func (c *command) healIDs(cfg Config, o layers.RepairOptions) (results []layers.RepairResult, err error) {
	err = c.whileStarting(func() error {
		_, live, err := c.report(cfg)
		if err != nil {
			return err
		}
		if live {
			return c.request(cfg, admin.RepairPath, o, &results)
		}
		if err := setUpLog(cfg.LogLevel); err != nil {
			return err
		}
		results, err = snapshotter.RepairRoot(c.ctx, cfg.snapshotter(), o)
		return err
	})
	return results, err
}

func (c *command) printRepair(results []layers.RepairResult, applied bool) error {
	if len(results) == 0 {
		fmt.Fprintln(c.stdout, "all snapshots are ready")
		return nil
	}
	t := tabwriter.NewWriter(c.stdout, 0, 8, 2, ' ', 0)
	header := "PLAN"
	if applied {
		header = "DONE"
	}
	fmt.Fprintf(t, "ID\tCHAIN ID\tSTATE\tFINDING\t%s\n", header)
	for _, r := range results {
		fmt.Fprintf(t, "%d\t%s\t%s\t%s\t%s\n", r.ID, cmp.Or(r.ChainID, r.Name), r.State, findingOf(r.Result), r.Plan)
	}
	return t.Flush()
}

func (c *command) rebuild(cfg Config, asJSON bool) error {
	r, err := rebuild.Database(c.ctx, cfg.Root)
	if err != nil {
		return err
	}
	if asJSON {
		return c.printJSON(r)
	}
	fmt.Fprintf(c.stdout, "rebuilt: %d committed, %d active, %d views\n", r.Committed, r.Active, r.Views)
	if r.OldFile != "" {
		fmt.Fprintf(c.stdout, "kept: %s\n", r.OldFile)
	}
	for _, s := range r.SetAside {
		fmt.Fprintf(c.stdout, "set aside: %s: %q: %s\n", s.Directory, s.Name, s.Reason)
	}
	return nil
}

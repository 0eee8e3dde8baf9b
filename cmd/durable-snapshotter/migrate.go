package main

import (
	"errors"
	"fmt"
	"slices"
	"text/tabwriter"

	"github.com/durable-snapshotter/durable-snapshotter/internal/images"
	"github.com/durable-snapshotter/durable-snapshotter/internal/migrate"
)

// The answers of migrate, which are no failures of it.
var (
	errNeedPull    = errors.New("some images can only be pulled")
	errNotMigrated = errors.New("the state of some images is unknown")
)

// migrateImages unpacks the images of containerd into this snapshotter, or into another one, from
// what is on the node; with --finish it lets go of the snapshots in others.
func migrateImages(c *command) error {
	to := c.flags.String("to", "", "")
	finish := c.flags.Bool("finish", false, "")
	namespace := c.flags.String("namespace", "", "")
	asJSON := c.flags.Bool("json", false, "")
	names, err := c.parse()
	if err != nil {
		return err
	}
	cfg, err := c.config()
	if err != nil {
		return err
	}
	results, finished := []migrate.Result{}, 0
	o := images.Options{Namespaces: listOf(*namespace), Names: names}
	_, err = c.withImages(cfg, o, func(checker *images.Checker, rows *imageRows) ([]images.Image, error) {
		if *to == "" {
			*to = rows.name
		}
		known, err := rows.conn.Snapshotters(c.ctx)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(known, *to) {
			return nil, fmt.Errorf("--to %q: containerd has the snapshotters %q: %w", *to, known, errUsage)
		}
		found, err := checker.Check(c.ctx)
		if err != nil {
			return nil, err
		}
		m := migrate.New(rows.conn, rows.name, *to)
		bar := newProgress(c, len(found))
		bar.what = "images"
		defer bar.clear()
		if results, err = m.Unpack(c.ctx, checker, found, bar.set); err != nil || !*finish {
			return found, err
		}
		// The records have changed.
		if found, err = checker.Check(c.ctx); err != nil {
			return nil, err
		}
		if finished, err = m.Finish(c.ctx, found); err != nil {
			return nil, err
		}
		if found, err = checker.Check(c.ctx); err != nil {
			return nil, err
		}
		results, err = m.Unpack(c.ctx, checker, found, nil)
		return found, err
	})
	if err != nil {
		return err
	}
	if *asJSON {
		err = c.printJSON(results)
	} else {
		err = c.printMigrated(results, *to, *finish, finished)
	}
	if err != nil {
		return err
	}
	has := func(s migrate.State) bool {
		return slices.ContainsFunc(results, func(r migrate.Result) bool { return r.State == s })
	}
	switch {
	case has(migrate.NeedsPull):
		return errNeedPull
	case has(migrate.Unknown):
		return errNotMigrated
	}
	return nil
}

func (c *command) printMigrated(results []migrate.Result, to string, finish bool, finished int) error {
	t := tabwriter.NewWriter(c.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprint(t, "IMAGE\tNAMESPACE\tPLATFORM\tSTATE\tREASON\n")
	unpacked, left := 0, 0
	for _, r := range results {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", r.Image, r.Namespace, dash(r.Platform), r.State, r.Text())
		if r.Unpacked {
			unpacked++
		}
		if r.State == migrate.Left {
			left++
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(c.stderr, "durable-snapshotter: images: %d, unpacked into %s by this call: %d\n", len(results), to, unpacked)
	if finish {
		fmt.Fprintf(c.stderr, "durable-snapshotter: old snapshots are not kept any more, but for those that containers stand on, of images: %d\n", finished)
	} else if left > 0 {
		// Without its --to, the command would move all images again, the other way.
		fmt.Fprintf(c.stderr, "durable-snapshotter: hint: the same command with --finish lets go of the old snapshots, of images: %d\n", left)
	}
	return nil
}

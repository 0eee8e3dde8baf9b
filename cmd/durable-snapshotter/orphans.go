package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/orphans"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

const (
	// betweenFinds is longer than an operation of containerd is between its row here
	// and containerd's own record of it.
	betweenFinds = 5 * time.Second
	// inFlight is the age below which a snapshot is no orphan. The age
	// of one from the future is unknown: a clock was wrong.
	inFlight = 10 * time.Second
)

// errOrphans is the answer of repair --orphans when there are any.
var errOrphans = errors.New("there are snapshots that containerd does not know; --apply removes them")

// orphan is a snapshot that containerd does not know, or a directory without a row.
type orphan struct {
	ID      uint64    `json:"id"`
	Kind    string    `json:"kind"` // of the snapshot, or "directory"
	Name    string    `json:"name,omitempty"`
	Created time.Time `json:"created,omitzero"`
	Done    string    `json:"done"` // nothing, removed, or kept and why
}

const kindDirectory = "directory"

// orphans finds what nothing in containerd refers to, and with apply removes it.
//
// A running daemon leaves the removal to containerd's garbage collection, which knows
// what is in flight. Without a daemon nothing is in flight.
func (c *command) orphans(cfg Config, apply, asJSON bool) error {
	if cfg.Containerd.Address == "" {
		return errors.New("[containerd] address is empty: only containerd has the list of snapshots that it knows")
	}
	conn, err := repull.Connect(cfg.Containerd.Address)
	if err != nil {
		return err
	}
	defer conn.Close()
	names, err := conn.Served(c.ctx, cfg.Address)
	if err != nil {
		return err
	}
	find := func() ([]orphan, bool, error) {
		report, live, err := c.report(cfg)
		if err != nil {
			return nil, live, err
		}
		found, err := findOrphans(c.ctx, conn, names, report, live && apply)
		return found, live, err
	}
	found, live, err := find()
	if err == nil && len(found) > 0 {
		select {
		case <-c.ctx.Done():
			return c.ctx.Err()
		case <-time.After(betweenFinds):
		}
		var again []orphan
		again, live, err = find()
		found = bothTimes(found, again)
	}
	if err != nil {
		return err
	}
	if apply && len(found) > 0 {
		if live {
			err = c.collectOrphans(cfg, conn, names, found)
		} else {
			err = c.removeOrphans(cfg, conn, names, found)
		}
		if err != nil {
			return err
		}
	}
	if asJSON {
		err = c.printJSON(found)
	} else {
		err = c.printOrphans(found)
	}
	if err != nil {
		return err
	}
	if slices.ContainsFunc(found, func(o orphan) bool { return o.Done != "removed" }) {
		return errOrphans
	}
	return nil
}

// findOrphans finds what containerd does not know at this time. What some other client than containerd has made is no
// orphan; containerd's garbage collection would delete it all the same, so collecting
// is refused then.
func findOrphans(ctx context.Context, conn *repull.Containerd, names []string, r snapshotter.Report, collecting bool) ([]orphan, error) {
	if collecting && len(names) > 1 {
		return nil, fmt.Errorf("containerd serves this snapshotter under several names, %q, and deletes under one what it knows under another: leave one of them in its configuration", names)
	}
	sealed := map[string]time.Time{}
	for _, e := range r.Journal.Committed {
		sealed[e.Name] = e.Time
	}
	rows := make([]repull.Snapshot, len(r.Snapshots))
	for i, s := range r.Snapshots {
		rows[i] = repull.Snapshot{ID: s.ID, Name: s.Name}
		if t, ok := sealed[s.Name]; ok {
			rows[i].Sealed = t.Format(time.RFC3339Nano)
		}
	}
	unknown, err := orphans.Find(ctx, conn.View(), names, rows)
	if err != nil {
		return nil, err
	}
	if collecting && len(unknown.Foreign) > 0 {
		return nil, fmt.Errorf("snapshot %q is of another client than containerd, whose garbage collection would delete it: stop the daemon and call this again", unknown.Foreign[0].Name)
	}
	found := []orphan{}
	for _, u := range unknown.Rows {
		i := slices.IndexFunc(r.Snapshots, func(s snapshotter.SnapshotReport) bool { return s.ID == u.ID })
		s := r.Snapshots[i]
		if age := time.Since(s.Created); age < 0 || age >= inFlight {
			found = append(found, orphan{ID: s.ID, Kind: s.Kind, Name: s.Name, Created: s.Created, Done: "nothing"})
		}
	}
	dirs, err := os.ReadDir(layout.Root{Path: r.Root}.Snapshots())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for _, d := range dirs {
		id, err := strconv.ParseUint(d.Name(), 10, 64)
		if err == nil && d.IsDir() && !slices.ContainsFunc(r.Snapshots, func(s snapshotter.SnapshotReport) bool { return s.ID == id }) {
			found = append(found, orphan{ID: id, Kind: kindDirectory, Done: "nothing"})
		}
	}
	return found, nil
}

// bothTimes returns what was found both times.
func bothTimes(first, second []orphan) []orphan {
	return slices.DeleteFunc(second, func(o orphan) bool {
		return !slices.ContainsFunc(first, func(f orphan) bool { return f.ID == o.ID && f.Kind == o.Kind && f.Name == o.Name })
	})
}

// collectOrphans has containerd collect its garbage, and notes what is gone.
func (c *command) collectOrphans(cfg Config, conn *repull.Containerd, names []string, found []orphan) error {
	if err := conn.Collect(c.ctx, names[0]); err != nil {
		return err
	}
	report, _, err := c.report(cfg)
	if err != nil {
		return err
	}
	left, err := findOrphans(c.ctx, conn, names, report, false)
	if err != nil {
		return err
	}
	for i := range found {
		if len(bothTimes(found[i:i+1], slices.Clone(left))) == 0 {
			found[i].Done = "removed"
		} else {
			found[i].Done = "kept: containerd did not remove it; its log may have the reason"
		}
	}
	return nil
}

// removeOrphans takes the place of the daemon, finds them once more, and removes
// children before parents.
func (c *command) removeOrphans(cfg Config, conn *repull.Containerd, names []string, found []orphan) (err error) {
	if err := setUpLog(cfg.LogLevel); err != nil {
		return err
	}
	sc := cfg.snapshotter()
	sc.NoBackground = true
	sn, err := snapshotter.New(c.ctx, sc)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sn.Close()) }()
	report, err := sn.Inspect(c.ctx)
	if err != nil {
		return err
	}
	now, err := findOrphans(c.ctx, conn, names, report, false)
	if err != nil {
		return err
	}
	for again := true; again; {
		again = false
		for i, o := range found {
			if o.Kind == kindDirectory || o.Done == "removed" || len(bothTimes([]orphan{o}, slices.Clone(now))) == 0 {
				continue
			}
			switch err := sn.Remove(c.ctx, o.Name); {
			case errdefs.IsFailedPrecondition(err):
				found[i].Done = "kept: " + err.Error()
			case err != nil:
				return err
			default:
				found[i].Done, again = "removed", true
			}
		}
	}
	if err := sn.Cleanup(c.ctx); err != nil {
		return err
	}
	for i, o := range found {
		if o.Kind != kindDirectory {
			continue
		}
		if _, err := os.Lstat(layout.Root{Path: cfg.Root}.Dir(o.ID)); errors.Is(err, os.ErrNotExist) {
			found[i].Done = "removed"
		}
	}
	return nil
}

func (c *command) printOrphans(found []orphan) error {
	if len(found) == 0 {
		fmt.Fprintln(c.stdout, "containerd knows all snapshots")
		return nil
	}
	t := tabwriter.NewWriter(c.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tKIND\tNAME\tCREATED\tDONE")
	for _, o := range found {
		created := "-"
		if !o.Created.IsZero() {
			created = o.Created.Format(time.RFC3339)
		}
		fmt.Fprintf(t, "%d\t%s\t%q\t%s\t%s\n", o.ID, o.Kind, o.Name, created, o.Done)
	}
	return t.Flush()
}

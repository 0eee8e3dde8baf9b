package main

import (
	"fmt"
	"io"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// inspect prints the rows and the journal of metadata.db.
func inspect(c *command) error {
	asJSON := c.flags.Bool("json", false, "")
	if err := c.parseOnly(); err != nil {
		return err
	}
	cfg, err := c.config()
	if err != nil {
		return err
	}
	report, _, err := c.report(cfg)
	if err != nil {
		return err
	}
	if *asJSON {
		return c.printJSON(report)
	}
	c.warnBrake(report)
	return printReport(c.stdout, report)
}

func printReport(w io.Writer, r snapshotter.Report) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintf(t, "SNAPSHOTS of %s\nID\tKIND\tINODES\tSIZE\tNAME\tPARENT\n", r.Root)
	for _, s := range r.Snapshots {
		fmt.Fprintf(t, "%d\t%s\t%d\t%d\t%s\t%s\n", s.ID, s.Kind, s.Inodes, s.Size, s.Name, s.Parent)
	}
	fmt.Fprint(t, "\nOPEN\nID\tSTARTED\tEXTRACTION\tSTATE\tKEY\n")
	for _, e := range r.Journal.Open {
		state := "open"
		switch {
		case e.Poisoned != "":
			state = "refused: " + e.Poisoned
		case !e.Abandoned.IsZero():
			state = "closed by a restart"
		case e.CursorLost:
			state = "cursor lost"
		}
		fmt.Fprintf(t, "%d\t%s\t%t\t%s\t%s\n", e.ID, e.Started.Format(time.RFC3339), e.Extraction, state, e.Key)
	}
	states := map[uint64]storage.State{}
	for _, l := range r.Layers {
		states[l.ID] = l.State
	}
	fmt.Fprint(t, "\nCOMMITTED\nSEQUENCE\tID\tTIME\tSTATE\tSTRATEGY\tENTRIES\tBYTES\tNAME\n")
	for _, e := range r.Journal.Committed {
		fmt.Fprintf(t, "%d\t%d\t%s\t%s\t%s\t%d\t%d\t%s\n", e.Sequence, e.ID, e.Time.Format(time.RFC3339), states[e.ID], e.Strategy, e.Entries, e.Bytes, e.Name)
	}
	fmt.Fprint(t, "\nREMOVED\nSEQUENCE\tID\tCOMMITTED\tREMOVED\tNAME\n")
	for _, e := range r.Journal.History {
		fmt.Fprintf(t, "%d\t%d\t%s\t%s\t%s\n", e.Sequence, e.ID, e.Time.Format(time.RFC3339), e.Removed.Format(time.RFC3339), e.Name)
	}
	if s := r.Journal.Scrub; !s.Started.IsZero() {
		until := "in work, next is snapshot " + strconv.FormatUint(s.Next, 10)
		if !s.Finished.IsZero() {
			until = "finished " + s.Finished.Format(time.RFC3339)
		}
		fmt.Fprintf(t, "\nSCRUB of %s, started %s, %s: %d verified, %d damaged\n", s.Depth, s.Started.Format(time.RFC3339), until, s.Verified, s.Damaged)
	}
	return t.Flush()
}

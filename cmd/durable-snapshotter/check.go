package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// errNotReady is the answer of check, not a failure of it.
var errNotReady = errors.New("not all snapshots are ready")

// errNotLooked means that check could not look.
var errNotLooked = errors.New("could not look")

// check compares committed snapshots with their seals. It asks a running daemon
// which there are, looks for itself, and writes nothing.
func check(c *command) error {
	asJSON := c.flags.Bool("json", false, "")
	selected, err := c.parse()
	if err != nil {
		return err
	}
	cfg, err := c.config()
	if err != nil {
		return fmt.Errorf("%w: %w", errNotLooked, err)
	}
	entries, err := c.committed(cfg, selected)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotLooked, err)
	}
	results := []snapshotter.CheckResult{}
	progress := newProgress(c, len(entries))
	for _, e := range entries {
		r, err := snapshotter.Check(c.ctx, cfg.Root, e, snapshotter.CheckOptions{})
		if err != nil {
			progress.clear()
			return fmt.Errorf("%w: %w", errNotLooked, err)
		}
		if r.State != storage.StateReady && c.removed(cfg, e) {
			continue
		}
		results = append(results, r)
		progress.step()
	}
	progress.clear()
	if *asJSON {
		enc := json.NewEncoder(c.stdout)
		enc.SetIndent("", "  ")
		err = enc.Encode(results)
	} else {
		err = c.printResults(results)
	}
	if err != nil {
		return err
	}
	if slices.ContainsFunc(results, func(r snapshotter.CheckResult) bool { return r.State != storage.StateReady }) {
		return errNotReady
	}
	return nil
}

// committed returns the journal's entries of the selected snapshots: names,
// chain IDs or numbers; all when none is named. One that does not exist is an
// error.
func (c *command) committed(cfg Config, selected []string) ([]storage.CommitEntry, error) {
	report, err := c.report(cfg)
	if err != nil {
		return nil, err
	}
	entries := report.Journal.Committed
	if len(selected) == 0 {
		return entries, nil
	}
	names := func(e storage.CommitEntry) []string {
		return []string{e.Name, e.ChainID, strconv.FormatUint(e.ID, 10)}
	}
	for _, name := range selected {
		if !slices.ContainsFunc(entries, func(e storage.CommitEntry) bool { return slices.Contains(names(e), name) }) {
			return nil, fmt.Errorf("no committed snapshot has the name, chain ID or number %q", name)
		}
	}
	return slices.DeleteFunc(entries, func(e storage.CommitEntry) bool {
		return !slices.ContainsFunc(names(e), func(n string) bool { return slices.Contains(selected, n) })
	}), nil
}

// removed reports whether a snapshot that looked damaged was only removed
// meanwhile.
func (c *command) removed(cfg Config, e storage.CommitEntry) bool {
	report, err := c.report(cfg)
	return err == nil && !slices.ContainsFunc(report.Journal.Committed, func(now storage.CommitEntry) bool {
		return now.Sequence == e.Sequence
	})
}

func (c *command) printResults(results []snapshotter.CheckResult) error {
	t := tabwriter.NewWriter(c.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprint(t, "ID\tSTATE\tENTRIES\tBYTES\tSEALED\tNAME\tFINDING\n")
	for _, r := range results {
		finding := r.Reason
		if len(r.Findings) > 0 {
			finding = fmt.Sprintf("%q", r.Findings[0])
			if n := len(r.Findings) - 1; n > 0 {
				finding += fmt.Sprintf(" and %d more", n)
			}
		}
		fmt.Fprintf(t, "%d\t%s\t%d\t%d\t%s\t%s\t%s\n", r.ID, r.State, r.Entries, r.Bytes, r.Sealed.Format(time.RFC3339), r.Name, finding)
	}
	return t.Flush()
}

// progress is a line on a terminal that says how far a check is.
type progress struct {
	out         *os.File // nil: nobody watches
	done, total int
}

func newProgress(c *command, total int) *progress {
	p := &progress{total: total}
	if f, ok := c.stderr.(*os.File); ok && isTerminal(f) {
		p.out = f
	}
	return p
}

func (p *progress) step() {
	p.done++
	if p.out != nil {
		fmt.Fprintf(p.out, "\r%d of %d snapshots", p.done, p.total)
	}
}

func (p *progress) clear() {
	if p.out != nil {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
}

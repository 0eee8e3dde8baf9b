package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
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
	deep := c.flags.Bool("deep", false, "")
	cached := c.flags.Bool("cached", false, "")
	names, err := c.parse()
	if err != nil {
		return err
	}
	if *deep && *cached {
		return fmt.Errorf("--deep looks, and --cached does not: %w", errUsage)
	}
	cfg, err := c.config()
	if err != nil {
		return fmt.Errorf("%w: %w", errNotLooked, err)
	}
	results, err := c.look(cfg, names, *deep, *cached)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotLooked, err)
	}
	if *asJSON {
		err = c.printJSON(results)
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

// look looks at the named snapshots, or says what is known of them.
func (c *command) look(cfg Config, names []string, deep, cached bool) ([]snapshotter.CheckResult, error) {
	report, _, err := c.report(cfg)
	if err != nil {
		return nil, err
	}
	ids, err := idsOf(report, names)
	if err != nil {
		return nil, err
	}
	results := []snapshotter.CheckResult{}
	if cached {
		for _, r := range report.Layers {
			if len(ids) == 0 || slices.Contains(ids, r.ID) {
				results = append(results, r)
			}
		}
		return results, nil
	}
	o := snapshotter.CheckOptions{Deep: deep, Blobs: blobs.Open(cfg.ContentRoot), Reading: snapshotter.FromDisk}
	layers := report.Selected(ids)
	progress := newProgress(c, len(layers))
	defer progress.clear()
	o.Reading.Progress = progress.read
	for _, l := range layers {
		r, removed, err := c.lookAt(cfg, l, o)
		if err != nil {
			return nil, err
		}
		if !removed {
			results = append(results, r)
		}
		progress.step()
	}
	return results, nil
}

// lookAt looks at one layer. One that the daemon has removed or healed during
// the look only seemed to be damaged.
func (c *command) lookAt(cfg Config, l snapshotter.Layer, o snapshotter.CheckOptions) (r snapshotter.CheckResult, removed bool, err error) {
	for range 3 {
		o.Contents = l.Contents
		if r, err = snapshotter.Check(c.ctx, cfg.Root, l.CommitEntry, o); err != nil || r.State == storage.StateReady {
			return r, false, err
		}
		report, live, err := c.report(cfg)
		if err != nil || !live {
			return r, false, err
		}
		now := report.Selected([]uint64{l.ID})
		if len(now) == 0 || now[0].Sequence != l.Sequence {
			return r, true, nil
		}
		if now[0].Digest == l.Digest {
			return r, false, nil
		}
		l = now[0]
	}
	return r, false, nil
}

// idsOf finds snapshots by their names, chain IDs or numbers; nil when none is
// named. One that does not exist is an error.
func idsOf(report snapshotter.Report, names []string) (ids []uint64, err error) {
	for _, name := range names {
		before := len(ids)
		for _, l := range report.Journal.Committed {
			if name == l.Name || name == l.ChainID || name == strconv.FormatUint(l.ID, 10) {
				ids = append(ids, l.ID)
			}
		}
		if len(ids) == before {
			return nil, fmt.Errorf("no committed snapshot has the name, chain ID or number %q", name)
		}
	}
	return ids, nil
}

func (c *command) printResults(results []snapshotter.CheckResult) error {
	t := tabwriter.NewWriter(c.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprint(t, "ID\tCHAIN ID\tSTATE\tENTRIES\tSIZE\tSEALED\tFINDING\n")
	for _, r := range results {
		fmt.Fprintf(t, "%d\t%s\t%s\t%d\t%d\t%s\t%s\n",
			r.ID, cmp.Or(r.ChainID, r.Name), r.State, r.Entries, r.Bytes, r.Sealed.Format(time.RFC3339), findingOf(r))
	}
	return t.Flush()
}

// findingOf says in one cell of a table what is wrong with a layer.
func findingOf(r snapshotter.CheckResult) string {
	if len(r.Findings) == 0 {
		return r.Reason
	}
	text := fmt.Sprintf("%q", r.Findings[0].String())
	if n := len(r.Findings) - 1; n > 0 {
		text += fmt.Sprintf(" and %d more", n)
	}
	return text
}

// progress is a bar on a terminal that says how far a check is.
type progress struct {
	out         *os.File // nil: nobody watches
	done, total int
	bytes       int64 // of content
	drawn       time.Time
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
	p.draw()
}

// read hears of content that was read.
func (p *progress) read(bytes int64) {
	p.bytes += bytes
	if time.Since(p.drawn) > 100*time.Millisecond {
		p.draw()
	}
}

func (p *progress) draw() {
	const width = 30
	if p.out == nil || p.total == 0 {
		return
	}
	p.drawn = time.Now()
	full := width * p.done / p.total
	text := fmt.Sprintf("[%s%s] %d of %d snapshots", strings.Repeat("#", full), strings.Repeat(" ", width-full), p.done, p.total)
	if p.bytes > 0 {
		text += fmt.Sprintf(", %d MiB read", p.bytes>>20)
	}
	fmt.Fprint(p.out, "\r", text, "\x1b[K")
}

func (p *progress) clear() {
	if p.out != nil {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
}

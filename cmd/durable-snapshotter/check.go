package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/internal/images"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// The answers of check and repair, which are no failures of them. The exit status
// separates damage from what could not be verified, for a monitoring system.
var (
	errDamaged    = errors.New("not all snapshots are ready: some are damaged")
	errUnverified = errors.New("not all snapshots are ready: some could not be verified")
)

// errNotVerified means that check could not verify any layer.
var errNotVerified = errors.New("could not verify")

// check compares committed snapshots with their seals. It gets their list from a
// running daemon, verifies them in this process, and writes nothing. With --images it is
// about images of containerd.
func check(c *command) error {
	asJSON := c.flags.Bool("json", false, "")
	deep := c.flags.Bool("deep", false, "")
	cached := c.flags.Bool("cached", false, "")
	ofImages := c.flags.Bool("images", false, "")
	namespace := c.flags.String("namespace", "", "")
	names, err := c.parse()
	if err != nil {
		return err
	}
	if *deep && *cached {
		return fmt.Errorf("--deep verifies, and --cached does not: %w", errUsage)
	}
	if *ofImages && *cached || *namespace != "" && !*ofImages {
		return fmt.Errorf("--images does not go with --cached, and --namespace only with --images: %w", errUsage)
	}
	cfg, err := c.config()
	if err != nil {
		return fmt.Errorf("%w: %w", errNotVerified, err)
	}
	if *ofImages {
		return c.checkImages(cfg, images.Options{Namespaces: listOf(*namespace), Names: names, Deep: *deep}, *asJSON)
	}
	results, err := c.verify(cfg, names, *deep, *cached)
	if err != nil {
		return fmt.Errorf("%w: %w", errNotVerified, err)
	}
	if *asJSON {
		err = c.printJSON(results)
	} else {
		err = c.printResults(results)
	}
	if err != nil {
		return err
	}
	return verdict(results)
}

// verdict is the worst that was found, nil when all are ready. Content that there
// is nothing to compare with yet is nothing bad.
func verdict(results []verify.Result) error {
	has := func(states ...storage.State) bool {
		return slices.ContainsFunc(results, func(r verify.Result) bool { return slices.Contains(states, r.State) })
	}
	switch {
	case has(storage.StateDamaged, storage.StateHealing):
		return errDamaged
	case has(storage.StateUnverified):
		return errUnverified
	}
	return nil
}

// verify verifies the named snapshots, or returns what is known of them if cached.
func (c *command) verify(cfg Config, names []string, deep, cached bool) ([]verify.Result, error) {
	report, _, err := c.report(cfg)
	if err != nil {
		return nil, err
	}
	c.warnBrake(report)
	ids, err := idsOf(report, names)
	if err != nil {
		return nil, err
	}
	results := []verify.Result{}
	from := cfg.snapshotter().Sources()
	if cached {
		for _, r := range report.Layers {
			if len(ids) == 0 || slices.Contains(ids, r.ID) {
				r.FindBlob(c.ctx, from)
				results = append(results, r)
			}
		}
		return results, nil
	}
	o := verify.Options{Deep: deep, Blobs: from, Reading: verify.FromDisk}
	layers := report.Selected(ids)
	progress := newProgress(c, len(layers))
	defer progress.clear()
	o.Reading.Progress = progress.read
	for _, l := range layers {
		r, removed, err := c.verifyLayer(cfg, l, o)
		if err != nil {
			return nil, err
		}
		if !removed {
			r.FindBlob(c.ctx, from)
			results = append(results, r)
		}
		progress.step()
	}
	return results, nil
}

// verifyLayer verifies one layer. One that the daemon has removed or healed meanwhile
// only seemed to be damaged.
func (c *command) verifyLayer(cfg Config, l snapshotter.Layer, o verify.Options) (r verify.Result, removed bool, err error) {
	for range 3 {
		if r, err = l.Verify(c.ctx, cfg.Root, o); err != nil || r.State == storage.StateReady {
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

func (c *command) printResults(results []verify.Result) error {
	t := tabwriter.NewWriter(c.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprint(t, "ID\tCHAIN ID\tSTATE\tENTRIES\tSIZE\tSEALED\tBLOB\tFINDING\n")
	for _, r := range results {
		fmt.Fprintf(t, "%d\t%s\t%s\t%d\t%d\t%s\t%s\t%s\n",
			r.ID, cmp.Or(r.ChainID, r.Name), r.State, r.Entries, r.Bytes, r.Sealed.Format(time.RFC3339), blobOf(r), findingOf(r))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	c.summarize(results)
	return nil
}

// blobOf is, in one cell of a table, whether the layer could be healed.
func blobOf(r verify.Result) string {
	switch {
	case r.Blob != "" || r.Place != "":
		return "yes"
	case r.Lacking:
		return "no"
	}
	return "unknown"
}

// summarize counts layers by their states, the not comparable apart from those
// that could not be verified, and those that nothing could heal.
func (c *command) summarize(results []verify.Result) {
	counts, lacking := map[storage.State]int{}, 0
	for _, r := range results {
		counts[r.State]++
		if r.Lacking {
			lacking++
		}
	}
	parts := []string{}
	for _, state := range slices.Sorted(maps.Keys(counts)) {
		parts = append(parts, fmt.Sprintf("%d %s", counts[state], state))
	}
	if len(counts) > 1 {
		fmt.Fprintf(c.stderr, "durable-snapshotter: %d layers: %s\n", len(results), strings.Join(parts, ", "))
	}
	if lacking > 0 {
		fmt.Fprintf(c.stderr, "durable-snapshotter: %d layers have no blob in the content store: if they were damaged, nothing could heal them\n"+
			"durable-snapshotter: hint: ctr content fetch brings the blobs of an image back\n", lacking)
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/imagecheck"
	"github.com/durable-snapshotter/durable-snapshotter/internal/images"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// The answers of check --images and repair --images, which are no failures of them.
var (
	errImagesDamaged    = errors.New("not all images are ready")
	errImagesUnverified = errors.New("the state of some images is unknown")
)

// errNoAnswer means that the state of no image is known.
var errNoAnswer = errors.New("the state of the images is unknown")

// checkImages prints the readiness of images.
func (c *command) checkImages(cfg Config, o images.Options, asJSON bool) error {
	found, err := c.withImages(cfg, o, func(checker *images.Checker, _ *imageRows) ([]images.Image, error) {
		return checker.Check(c.ctx)
	})
	if err != nil {
		return err
	}
	if asJSON {
		err = c.printJSON(found)
	} else {
		err = c.printImages(found)
	}
	if err != nil {
		return err
	}
	return imagesVerdict(found)
}

// imagesVerdict is the worst that was found, nil when all images run, or can be unpacked.
func imagesVerdict(found []images.Image) error {
	if slices.ContainsFunc(found, func(i images.Image) bool { return i.Verdict.Bad() }) {
		return errImagesDamaged
	}
	if slices.ContainsFunc(found, func(i images.Image) bool { return i.Verdict == images.Unknown }) {
		return errImagesUnverified
	}
	return nil
}

// withImages connects to containerd and calls do with what examines its images.
func (c *command) withImages(cfg Config, o images.Options, do func(*images.Checker, *imageRows) ([]images.Image, error)) ([]images.Image, error) {
	if cfg.Containerd.Address == "" {
		return nil, fmt.Errorf("%w: [containerd] address is empty: only containerd knows the images", errNoAnswer)
	}
	conn, err := repull.Connect(cfg.Containerd.Address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if o.Snapshotter, err = cfg.imageCheck().Name(c.ctx, conn); err != nil {
		return nil, fmt.Errorf("%w: containerd at %s: %w", errNoAnswer, cfg.Containerd.Address, err)
	}
	progress := newProgress(c, 0)
	progress.what = "layers and blobs"
	defer progress.clear()
	o.Blobs, o.Archives = blobs.Open(cfg.ContentRoot), cfg.snapshotter().Outside()
	r := &imageRows{c: c, cfg: cfg, conn: conn, name: o.Snapshotter, options: verify.Options{Deep: o.Deep, Blobs: o.Blobs, Reading: verify.FromDisk}}
	r.options.Reading.Progress = progress.read
	o.Rows, o.Verify, o.Progress = r.list, r.verify, progress.set
	found, err := do(images.NewChecker(conn, o), r)
	if errors.Is(err, errUsage) {
		return nil, err
	}
	if errors.Is(err, images.ErrNotFound) {
		return nil, fmt.Errorf("%w: %w", errNotVerified, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoAnswer, err)
	}
	return found, nil
}

// imageRows are the rows of the snapshotter, from a running daemon or a stopped one's
// database, and the verification of their layers in this process.
type imageRows struct {
	c       *command
	cfg     Config
	conn    *repull.Containerd
	name    string                       // of the snapshotter at containerd
	options verify.Options               // of each verification
	layers  map[uint64]snapshotter.Layer // of the latest list
	warned  bool
}

func (r *imageRows) list(context.Context) ([]images.Row, error) {
	report, _, err := r.c.report(r.cfg)
	if err != nil {
		return nil, err
	}
	if !r.warned {
		r.c.warnBrake(report)
		r.warned = true
	}
	var rows []images.Row
	rows, r.layers = imagecheck.RowsOf(report)
	return rows, nil
}

func (r *imageRows) verify(_ context.Context, row images.Row) (found verify.Result, removed bool, err error) {
	l, ok := r.layers[row.ID]
	if !ok || l.Name != row.Name {
		return found, true, nil
	}
	return r.c.verifyLayer(r.cfg, l, r.options)
}

// confirm verifies a layer again, and returns nil only when it is damaged still.
func (r *imageRows) confirm(ctx context.Context, row images.Row, deep bool) error {
	if _, err := r.list(ctx); err != nil {
		return err
	}
	l, ok := r.layers[row.ID]
	if !ok || l.Name != row.Name {
		return fmt.Errorf("nothing is removed: snapshot %s has gone meanwhile", row.Name)
	}
	// Not in the light of what is known: the finding is to be made again.
	o := r.options
	o.Deep, o.Contents = deep, l.Known.Contents
	found, err := verify.Layer(ctx, r.cfg.Root, l.CommitEntry, o)
	if err != nil {
		return err
	}
	if found.State != storage.StateDamaged {
		return fmt.Errorf("nothing is removed: snapshot %s is %s when it is verified again", row.Name, found.State)
	}
	return nil
}

func (c *command) printImages(found []images.Image) error {
	t := tabwriter.NewWriter(c.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprint(t, "IMAGE\tNAMESPACE\tPLATFORM\tVERDICT\tREASON\n")
	counts := map[images.Verdict]int{}
	for _, i := range found {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", i.Name, i.Namespace, dash(i.Platform), i.Verdict, reasonText(i))
		counts[i.Verdict]++
	}
	if err := t.Flush(); err != nil {
		return err
	}
	parts := []string{}
	for _, v := range slices.Sorted(maps.Keys(counts)) {
		parts = append(parts, fmt.Sprintf("%d %s", counts[v], v))
	}
	if len(counts) > 1 {
		fmt.Fprintf(c.stderr, "durable-snapshotter: %d images: %s\n", len(found), strings.Join(parts, ", "))
	}
	if counts[images.Healable]+counts[images.NeedsFetch] > 0 {
		fmt.Fprintf(c.stderr, "durable-snapshotter: hint: durable-snapshotter repair --images prints what can be done\n")
	}
	return nil
}

// listOf is a list of one, none for "".
func listOf(one string) []string {
	if one == "" {
		return nil
	}
	return []string{one}
}

func dash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

// reasonText is the reason for a verdict, and what a pull would bring.
func reasonText(i images.Image) string {
	if i.Fetch == nil || i.Verdict != images.NeedsFetch && i.Verdict != images.InUse && i.Verdict != images.Incomplete {
		return i.Reason
	}
	text := fmt.Sprintf("%s; to fetch: %s", i.Reason, sizeText(i.Fetch.Bytes))
	if i.Fetch.AtLeast {
		text += " or more"
	}
	if len(i.Fetch.From) > 0 {
		text += " from " + strings.Join(i.Fetch.From, ", ")
	}
	return text
}

func sizeText(bytes int64) string {
	if bytes < 1<<20 {
		return fmt.Sprintf("%.1f KiB", float64(bytes)/(1<<10))
	}
	return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20))
}

// repairImages prints what can be done about images that are not ready, and does it with
// apply.
func (c *command) repairImages(cfg Config, o images.Options, apply, force, asJSON bool) error {
	repairs := []images.Repair{}
	found, err := c.withImages(cfg, o, func(checker *images.Checker, rows *imageRows) ([]images.Image, error) {
		found, err := checker.Check(c.ctx)
		if err != nil {
			return nil, err
		}
		ro := images.RepairOptions{
			Force: force, ContentRoot: cfg.ContentRoot, Registry: cfg.Heal.Registry, Hosts: cfg.Heal.Hosts,
			Heal: c.healImages(cfg), Confirm: rows.confirm,
		}
		if apply {
			repairs, err = checker.Apply(c.ctx, found, ro)
		} else {
			repairs, err = checker.Plan(c.ctx, found, ro)
		}
		return found, err
	})
	if err != nil {
		return err
	}
	if asJSON {
		err = c.printJSON(repairs)
	} else {
		err = c.printRepairs(repairs, apply)
	}
	if err != nil {
		return err
	}
	left := slices.DeleteFunc(found, func(i images.Image) bool {
		return slices.ContainsFunc(repairs, func(r images.Repair) bool {
			return r.Namespace == i.Namespace && r.Target == i.Target
		})
	})
	for _, r := range repairs {
		if !r.Dropped {
			left = append(left, r.Image)
		}
	}
	return imagesVerdict(left)
}

// healImages returns the function that heals layers: in the daemon, or in this process when
// none is running.
func (c *command) healImages(cfg Config) func(context.Context, []uint64, bool) (map[uint64]string, error) {
	return func(_ context.Context, ids []uint64, deep bool) (map[uint64]string, error) {
		results, err := c.healIDs(cfg, layers.RepairOptions{IDs: ids, Deep: deep, Apply: true})
		done := map[uint64]string{}
		for _, r := range results {
			done[r.ID] = r.Plan
			if !r.Healed && r.Reason != "" {
				done[r.ID] += ": " + r.Reason
			}
		}
		return done, err
	}
}

func (c *command) printRepairs(repairs []images.Repair, applied bool) error {
	if len(repairs) == 0 {
		fmt.Fprintln(c.stdout, "no image needs a repair")
		return nil
	}
	for _, r := range repairs {
		verdict := string(r.Verdict)
		if r.Dropped {
			verdict = "dropped; the next pull brings it"
		}
		fmt.Fprintf(c.stdout, "%s (namespace %s, %s): %s\n", r.Name, r.Namespace, dash(r.Platform), verdict)
		if r.Reason != "" && !r.Dropped {
			fmt.Fprintf(c.stdout, "  reason: %s\n", reasonText(r.Image))
		}
		for n, s := range r.Plan {
			if !applied {
				fmt.Fprintf(c.stdout, "  step %d, %s: %s\n", n+1, s.Action, s.Text)
			}
		}
		if r.Done != "" {
			fmt.Fprintf(c.stdout, "  done: %s\n", r.Done)
		}
		if r.Blocked != "" {
			fmt.Fprintf(c.stdout, "  blocked: %s\n", r.Blocked)
		}
	}
	return nil
}

package doctor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/durable-snapshotter/durable-snapshotter/internal/imagecheck"
	"github.com/durable-snapshotter/durable-snapshotter/internal/images"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/orphans"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
)

// Content are facts about what containerd has: images, containers, snapshots.
type Content struct {
	Err    error          // why nothing is known of the images
	Images []images.Image // with verdicts by what is known of their layers, without a verification
	Pinned []string       // names of images that the kubelet never removes
	Bytes  int64          // of the images that only others have
	Others map[string]int // images that other snapshotters have, by snapshotter
	// Foreign are the containers that stand on other snapshotters, by snapshotter.
	Foreign    map[string][]string
	ForeignErr error

	Orphans    []string // snapshots, and directories without a row
	OrphansErr error
}

const (
	// betweenFinds is longer than an operation of containerd is between its row here and
	// containerd's own record of it.
	betweenFinds = 5 * time.Second
	// inFlight is the age below which a snapshot is no orphan.
	inFlight = 10 * time.Second
)

// examine takes the facts through containerd.
func examine(ctx context.Context, f *Facts) (c Content) {
	c.Others, c.Foreign = map[string]int{}, map[string][]string{}
	err, conn := f.Running.Err, (*repull.Containerd)(nil)
	if err == nil {
		conn, err = repull.Connect(f.Containerd)
	}
	if err != nil {
		c.Err, c.ForeignErr, c.OrphansErr = err, err, err
		return c
	}
	defer conn.Close()
	c.ForeignErr = c.foreign(ctx, conn, f)
	names := []string{}
	for _, p := range f.ours() {
		names = append(names, p.ID)
	}
	switch {
	case len(names) == 0:
		c.Err = errors.New("the running containerd does not have this snapshotter")
	case f.ReportErr != nil:
		c.Err = fmt.Errorf("there is no report of the daemon: %w", f.ReportErr)
	}
	if c.Err != nil {
		c.OrphansErr = c.Err
		return c
	}
	rows, layers := imagecheck.RowsOf(f.Report)
	checker := images.NewChecker(conn, images.Options{
		Snapshotter: names[0],
		Rows:        func(context.Context) ([]images.Row, error) { return rows, nil },
		Verify: func(ctx context.Context, row images.Row) (verify.Result, bool, error) {
			known := layers[row.ID].Known
			if f.Sources != nil {
				known.FindBlob(ctx, f.Sources)
			}
			return known, false, ctx.Err()
		},
	})
	if c.Images, c.Err = checker.Check(ctx); c.Err == nil {
		c.Pinned, c.Err = images.Pinned(ctx, conn)
	}
	for _, i := range c.Images {
		for name := range i.Unpacked() {
			if !slices.Contains(names, name) {
				c.Others[name]++
			}
		}
		if i.Verdict == images.NotOurs {
			for _, l := range i.Layers {
				if info, err := conn.View().Content().Info(namespaces.WithNamespace(ctx, i.Namespace), l.Blob); err == nil {
					c.Bytes += info.Size
				}
			}
		}
	}
	c.Orphans, c.OrphansErr = strays(ctx, conn, names, f)
	return c
}

// foreign lists the containers whose snapshots are in other snapshotters.
func (c *Content) foreign(ctx context.Context, conn *repull.Containerd, f *Facts) error {
	all, err := conn.View().Namespaces(ctx)
	if err != nil {
		return err
	}
	for _, p := range f.Running.Plugins {
		if p.Type != snapshotType || slices.ContainsFunc(f.ours(), func(o repull.Plugin) bool { return o.ID == p.ID }) {
			continue
		}
		for _, ns := range all {
			found, err := conn.View().Containers(namespaces.WithNamespace(ctx, ns), p.ID)
			if err != nil {
				return err
			}
			for _, one := range found {
				c.Foreign[p.ID] = append(c.Foreign[p.ID], one.String())
			}
		}
	}
	return nil
}

// strays are snapshots that containerd does not know, and directories without a row. What is found
// once may be in flight, so they are found twice.
func strays(ctx context.Context, conn *repull.Containerd, names []string, f *Facts) ([]string, error) {
	find := func() (map[string]bool, error) {
		report, err := f.Config.Report(ctx)
		if err != nil || report.Root != f.Root {
			report = f.Report
		}
		rows := make([]repull.Snapshot, len(report.Snapshots))
		known, young := map[uint64]bool{}, map[uint64]bool{}
		sealed := map[uint64]string{}
		for _, e := range report.Journal.Committed {
			sealed[e.ID] = e.Time.Format(time.RFC3339Nano)
		}
		for i, s := range report.Snapshots {
			rows[i] = repull.Snapshot{ID: s.ID, Name: s.Name, Sealed: sealed[s.ID]}
			known[s.ID] = true
			age := time.Since(s.Created)
			young[s.ID] = age >= 0 && age < inFlight
		}
		unknown, err := orphans.Find(ctx, conn.View(), names, rows)
		if err != nil {
			return nil, err
		}
		found := map[string]bool{}
		for _, r := range unknown.Rows {
			if !young[r.ID] {
				found[fmt.Sprintf("snapshot %d, %s", r.ID, r.Name)] = true
			}
		}
		dirs, err := os.ReadDir(layout.Root{Path: f.Root}.Snapshots())
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		for _, d := range dirs {
			if id, err := strconv.ParseUint(d.Name(), 10, 64); err == nil && d.IsDir() && !known[id] {
				found[fmt.Sprintf("directory %d", id)] = true
			}
		}
		return found, nil
	}
	first, err := find()
	if err != nil || len(first) == 0 {
		return nil, err
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(betweenFinds):
	}
	second, err := find()
	maps.DeleteFunc(second, func(k string, _ bool) bool { return !first[k] })
	return slices.Sorted(maps.Keys(second)), err
}

// some is a list of a few examples.
func some(all []string) string {
	text := strings.Join(all[:min(3, len(all))], ", ")
	if len(all) > 3 {
		text += fmt.Sprintf(" and %d more", len(all)-3)
	}
	return text
}

// count is a number of things.
func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// isPinned reports whether the kubelet never removes an image.
func (c Content) isPinned(i images.Image) bool {
	return slices.ContainsFunc(i.Names, func(n string) bool { return slices.Contains(c.Pinned, n) })
}

func pinnedImages(f *Facts) (found []Finding) {
	if f.Content.Err != nil {
		return unknown(f.Content.Err.Error())
	}
	n, unclear := 0, ""
	for _, i := range f.Content.Images {
		if !f.Content.isPinned(i) {
			continue
		}
		n++
		text := fmt.Sprintf("%s (namespace %s): %s: %s", i.Name, i.Namespace, i.Verdict, i.Reason)
		switch {
		case i.Verdict.Bad() || i.Fetch != nil && i.Verdict == images.NotOurs:
			found = append(found, fail(text, "import or pull it again before the next pod is created")...)
		case i.Verdict == images.Incomplete:
			found = append(found, warn(text, "import or pull it again: it can neither be healed nor moved")...)
		case i.Verdict == images.NotOurs || i.Verdict == images.NotUnpacked:
			found = append(found, warn(text, "durable-snapshotter migrate")...)
		case i.Verdict == images.Unknown:
			unclear = text
		}
	}
	switch {
	case n == 0:
		return ok("no image is pinned")
	case len(found) == 0 && unclear != "":
		return unknown(unclear)
	}
	return orOK(found, count(n, "pinned image")+" ready")
}

func allImages(f *Facts) (found []Finding) {
	if f.Content.Err != nil {
		return unknown(f.Content.Err.Error())
	}
	by := map[images.Verdict][]string{}
	for _, i := range f.Content.Images {
		if !f.Content.isPinned(i) {
			by[i.Verdict] = append(by[i.Verdict], i.Name)
		}
	}
	var bad []string
	for _, v := range []images.Verdict{images.InUse, images.NeedsFetch, images.Healable} {
		for _, name := range by[v] {
			bad = append(bad, fmt.Sprintf("%s (%s)", name, v))
		}
	}
	if len(bad) > 0 {
		found = append(found, fail(fmt.Sprintf("%s not ready: %s", count(len(bad), "image"), some(bad)), "durable-snapshotter repair --images prints what can be done; with --apply does it")...)
	}
	if names := by[images.Incomplete]; len(names) > 0 {
		found = append(found, warn(fmt.Sprintf("%s without all blobs: %s", count(len(names), "image"), some(names)), "pull them again, or ctr content fetch: they can neither be healed nor moved")...)
	}
	if names := by[images.NotOurs]; len(names) > 0 {
		found = append(found, warn(fmt.Sprintf("%s, %.1f MiB compressed, unpacked for another snapshotter only: %s", count(len(names), "image"), float64(f.Content.Bytes)/(1<<20), some(names)), "durable-snapshotter migrate")...)
	}
	if names := by[images.Unknown]; len(names) > 0 && len(found) == 0 {
		return unknown(fmt.Sprintf("the state of %s is not known: %s", count(len(names), "image"), some(names)))
	}
	return orOK(found, fmt.Sprintf("%s ready, or unpacked when a container needs it", count(len(f.Content.Images), "image")))
}

func containers(f *Facts) (found []Finding) {
	if f.Content.ForeignErr != nil {
		return unknown(f.Content.ForeignErr.Error())
	}
	for _, name := range slices.Sorted(maps.Keys(f.Content.Foreign)) {
		all := f.Content.Foreign[name]
		found = append(found, warn(fmt.Sprintf("%s on %s: %s", count(len(all), "container"), name, some(all)), "")...)
	}
	return orOK(found, "no container stands on another snapshotter")
}

func orphaned(f *Facts) []Finding {
	switch {
	case f.Content.OrphansErr != nil:
		return unknown(f.Content.OrphansErr.Error())
	case len(f.Content.Orphans) > 0:
		return warn(fmt.Sprintf("%s that containerd does not know: %s", count(len(f.Content.Orphans), "snapshot"), some(f.Content.Orphans)), "")
	}
	return ok("containerd knows all snapshots")
}

package oracle

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Examiner examines disks.
type Examiner struct {
	Subject Subject
	Plan    *workload.Plan
	Record  *workload.Record
	Scratch string          // directory for mount points, not on the disk
	Marks   workload.Marker // gets a mark of what is reported and what is done; may be nil
	Strict  bool            // verify what only durable-snapshotter promises
	Generic bool            // read layers through mounts only, as the Runner did
	Tag     string          // in the keys it makes: a later examination of the same disk needs another one
	// Healable are layers of Record.Hopeless of which a good blob has come meanwhile: they
	// may be whole again, and may still be refused.
	Healable []string
	// SameBoot: only the snapshotter went down, not the machine.
	SameBoot bool
}

// Extent is how far an examination goes.
type Extent struct {
	Retry []string // names to extract and commit if they are not there
	All   bool     // extract all names of the plan that are not there, and mount the chains
	Again bool     // start a second time
}

// Seen is one row of the snapshotter.
type Seen struct {
	Parent string
	Denied error  // the error of Stat, View or Mounts
	Diff   string // there was none, and this is what is not as it was
	Due    bool   // it was denied as it should be: its chain is damaged and cannot be healed
	Whole  bool   // it was denied, and its tree is as it was
	Lie    string // it was a success for a chain that is damaged and cannot be healed

	Hopeless string // the layer of its chain, itself included, that cannot be healed
	Mounted  string // what is not as it was where its whole chain is mounted
	Cleared  string // how a verification made it ready that could not see the damage
}

// Observation is what an examination has found.
type Observation struct {
	Start     error           // it did not start
	Committed map[string]Seen // by name
	Active    map[string]Seen // by key
	Flaws     []string        // of the store as a whole
	Retried   map[string]bool // names extracted and committed afterwards
	Healing   int             // trees that were being extracted again when the power went
	Recorded  map[string]bool // committed names in the records beside the layers, before recovery; nil if they were not read
	Corrupt   map[string]bool // layers of which only content was changed by hand
	NoBlob    map[string]bool // layers that were reported as without a good blob, and have one
}

func (o *Observation) flaw(format string, args ...any) {
	o.Flaws = append(o.Flaws, fmt.Sprintf(format, args...))
}

// examination is one in progress.
type examination struct {
	*Examiner
	Observation
	s    snapshots.Snapshotter
	root string
	dirs map[string]string // by name or key: its directory below root
	ids  map[string]uint64 // by name or key: its number, where the journal could be read
	view int
}

// Examine starts the snapshotter on root, compares what it reports with what is there,
// stops it, and does so once more.
func (l *Examiner) Examine(ctx context.Context, root string, extent Extent) Observation {
	ctx = quiet(namespaces.WithNamespace(ctx, "default"))
	k := &examination{
		Examiner: l, root: root, dirs: map[string]string{},
		Observation: Observation{
			Committed: map[string]Seen{}, Active: map[string]Seen{}, Retried: map[string]bool{},
			Corrupt: map[string]bool{}, NoBlob: map[string]bool{},
		},
	}
	for _, name := range l.Record.Corrupt {
		k.Corrupt[name] = true
	}
	if k.Strict {
		k.records()
	}
	k.boot()
	if beside, err := os.ReadDir(filepath.Join(root, "healing")); err == nil {
		k.Healing = len(beside)
	}
	if k.s, k.Start = l.Subject.Start(ctx, root); k.Start != nil {
		return k.Observation
	}
	k.rows(ctx)
	k.layers(ctx, extent.All)
	k.actives(ctx)
	k.journal(ctx)
	k.denied(ctx)
	k.cleared(ctx)
	k.stale(ctx)
	k.orphans(ctx)
	k.retry(ctx, extent)
	before, err := list(ctx, k.s)
	if err != nil {
		k.flaw("walk at the end: %v", err)
	}
	k.reports()
	if !extent.Again {
		if err := k.s.Close(); err != nil {
			k.flaw("close: %v", err)
		}
		return k.Observation
	}
	k.end()
	k.again(ctx, before)
	return k.Observation
}

// list returns all rows, by name.
func list(ctx context.Context, s snapshots.Snapshotter) (map[string]snapshots.Info, error) {
	rows := map[string]snapshots.Info{}
	err := s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		rows[info.Name] = info
		return nil
	})
	// Stock overlay has no bucket to walk before its first snapshot, and reports it
	// in an error of no kind.
	if errdefs.IsNotFound(err) || err != nil && strings.Contains(err.Error(), "bucket does not exist") {
		err = nil
	}
	return rows, err
}

// rows reads what there is.
func (k *examination) rows(ctx context.Context) {
	rows, err := list(ctx, k.s)
	if err != nil {
		k.flaw("walk: %v", err)
	}
	for name, info := range rows {
		seen := Seen{Parent: info.Parent}
		got, err := k.s.Stat(ctx, name)
		switch {
		case err != nil:
			seen.Denied = fmt.Errorf("stat: %w", err)
		case got.Kind != info.Kind || got.Parent != info.Parent:
			k.flaw("stat reports %s on %q of %q, walk reports %s on %q", got.Kind, got.Parent, name, info.Kind, info.Parent)
		case k.Strict && info.Kind == snapshots.KindCommitted && got.Labels[labelState] != "ready":
			k.flaw("stat of %q succeeds, and reports it as %q", name, got.Labels[labelState])
		}
		if info.Kind == snapshots.KindCommitted {
			k.Committed[name] = seen
			if seen.Denied == nil {
				k.mark(workload.Ack, workload.Report, name, "")
			}
		} else {
			k.Active[name] = seen
		}
	}
}

func (k *examination) mark(phase workload.Phase, op workload.Op, name, key string) {
	if k.Marks == nil {
		return
	}
	if _, err := k.Marks.Mark(workload.Mark{Phase: phase, Op: op, Name: name, Key: key}.Text()); err != nil {
		k.flaw("mark: %v", err)
	}
}

// layers compares every committed layer with its fingerprint. A view of the top
// of a chain names the directories of all its layers.
func (k *examination) layers(ctx context.Context, merged bool) {
	names := make([]string, 0, len(k.Committed))
	for name := range k.Committed {
		names = append(names, name)
	}
	// Longest chains first: the others are parts of them.
	slices.SortFunc(names, func(a, b string) int {
		if d := len(k.chain(b)) - len(k.chain(a)); d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
	for _, name := range names {
		if (k.dirs[name] == "" || k.Generic) && k.Committed[name].Denied == nil {
			k.show(ctx, name, merged)
		}
	}
	for _, name := range names {
		seen := k.Committed[name]
		if seen.Denied == nil {
			seen.Diff += k.compare(name)
			k.Committed[name] = seen
		}
	}
}

// chain lists a name and its ancestors, as far as there are rows.
func (k *examination) chain(name string) []string {
	var chain []string
	for name != "" && len(chain) <= len(k.Committed) {
		chain = append(chain, name)
		name = k.Committed[name].Parent
	}
	return chain
}

// show makes a view of one name, which shows where it and its ancestors lie.
func (k *examination) show(ctx context.Context, name string, merged bool) {
	seen := k.Committed[name]
	defer func() { k.Committed[name] = seen }()
	k.view++
	key := fmt.Sprintf("default/examine%s-%d", k.Tag, k.view)
	k.mark(workload.Begin, workload.Prepare, key, "")
	mounts, err := k.s.View(ctx, key, name)
	if err != nil && !k.Strict {
		// Stock overlay trips over the directory of a Prepare that was cut short,
		// until a client calls Cleanup. The layer is not lost by that.
		k.flaw("view of %q before a cleanup: %v", name, err)
		if cleaner, ok := k.s.(snapshots.Cleaner); ok && cleaner.Cleanup(ctx) == nil {
			mounts, err = k.s.View(ctx, key, name)
		}
	}
	if err != nil {
		seen.Denied = fmt.Errorf("view: %w", err)
		return
	}
	defer func() {
		k.mark(workload.Begin, workload.Remove, key, "")
		if err := k.s.Remove(ctx, key); err != nil {
			k.flaw("remove a view of %q: %v", name, err)
		}
		k.mark(workload.Ack, workload.Remove, key, "")
	}()
	if k.Generic {
		if want := k.Record.Trees[name]; want != nil {
			seen.Diff += k.compareMerged(mounts, want)
		}
		return
	}
	_, lower, err := workload.Directories(mounts)
	chain := k.chain(name)
	if err != nil || len(lower) != len(chain) {
		seen.Diff = fmt.Sprintf("the mounts %v do not show the %d layers of the chain: %v", mounts, len(chain), err)
		return
	}
	for i, dir := range lower {
		if before := k.dirs[chain[i]]; before != "" && before != dir {
			k.flaw("%q has two directories: %s and %s", chain[i], before, dir)
		}
		k.dirs[chain[i]] = dir
	}
	if want := k.Record.Merged[name]; merged && want != nil {
		seen.Mounted = k.compareMerged(mounts, want)
	}
}

func (k *examination) compareMerged(mounts []mount.Mount, want kit.Tree) string {
	got, err := workload.Merged(mounts, k.Scratch)
	if err != nil {
		return err.Error()
	}
	if k.Generic {
		got = workload.Dateless(got)
	}
	if diff := kit.Diff(want, got, 3); diff != "" {
		return "mounted: " + diff
	}
	return ""
}

// compare returns what is not as it was when the layer had just been extracted.
func (k *examination) compare(name string) string {
	dir := k.dirs[name]
	if dir == "" {
		return "" // reported already
	}
	want, ok := k.Record.Trees[name]
	if !ok {
		return "" // of a name that was never committed: Judge knows
	}
	got, err := workload.Tree(dir)
	if err != nil {
		return err.Error()
	}
	return kit.Diff(want, got, 3)
}

// actives verifies that the directories of active snapshots are there.
func (k *examination) actives(ctx context.Context) {
	for key, seen := range k.Active {
		if seen.Denied != nil {
			continue
		}
		mounts, err := k.s.Mounts(ctx, key)
		if err != nil {
			seen.Denied = fmt.Errorf("mounts: %w", err)
			seen.Due = k.due(seen.Parent, err)
			k.Active[key] = seen
			continue
		}
		if l := k.beyondHope(seen.Parent); l != nil && !slices.Contains(k.Healable, l.Name) {
			seen.Lie, seen.Hopeless = "mounted on a parent that is damaged, and cannot be healed", l.Name
		}
		if k.Generic {
			continue
		}
		upper, lower, err := workload.Directories(mounts)
		if err != nil {
			seen.Diff = err.Error()
		}
		if upper != "" {
			k.dirs[key] = upper
			lower = append(lower, upper, filepath.Join(filepath.Dir(upper), "work"))
		}
		for _, dir := range lower {
			if info, err := os.Lstat(dir); err != nil {
				seen.Diff += err.Error() + "\n"
			} else if !info.IsDir() {
				seen.Diff += dir + " is not a directory\n"
			}
		}
		k.Active[key] = seen
	}
}

// stale tries to commit every extraction of before the crash. It is not known what
// of it reached the disk, so it must be refused.
func (k *examination) stale(ctx context.Context) {
	if !k.Strict {
		return
	}
	for key := range k.Active {
		for _, chain := range k.Plan.Chains {
			for _, l := range chain.Layers {
				if !strings.HasSuffix(key, " "+l.ChainID) {
					continue
				}
				name := fmt.Sprintf("default/stale%s/%s", k.Tag, l.ChainID)
				if err := k.s.Commit(ctx, name, key); err == nil {
					k.flaw("an extraction of before the crash could be committed: %q", key)
				} else if !errdefs.IsFailedPrecondition(err) {
					k.flaw("commit of an extraction of before the crash: %v, want failed precondition", err)
				}
			}
		}
	}
}

// journal compares the rows with the journal of durable-snapshotter. Other
// snapshotters have none.
func (k *examination) journal(ctx context.Context) {
	s, ok := k.s.(interface {
		Inspect(context.Context) (snapshotter.Report, error)
	})
	if !ok {
		return
	}
	report, err := s.Inspect(ctx)
	if err != nil {
		k.flaw("inspect: %v", err)
		return
	}
	k.ids = map[string]uint64{}
	committed := map[string]bool{}
	for _, e := range report.Journal.Committed {
		committed[e.Name] = true
		k.ids[e.Name] = e.ID
		if e.Strategy == storage.StrategyHealed && k.Record.Damaged[e.Name] == "" {
			k.flaw("a false alarm: %q was healed, and was never damaged", e.Name)
		}
		if _, ok := k.Committed[e.Name]; !ok {
			k.flaw("the journal has a commit of %q, the rows do not", e.Name)
		}
	}
	for name := range k.Committed {
		if !committed[name] {
			k.flaw("%q is committed, and the journal does not know it", name)
		}
	}
	for _, e := range report.Journal.Open {
		k.ids[e.Key] = e.ID
		if _, ok := k.Active[e.Key]; !ok {
			k.flaw("the journal has %q open, the rows do not", e.Key)
		}
	}
}

// orphans searches for directories that no row refers to, after Cleanup.
func (k *examination) orphans(ctx context.Context) {
	cleaner, ok := k.s.(snapshots.Cleaner)
	if !ok {
		return
	}
	if err := cleaner.Cleanup(ctx); errdefs.IsNotImplemented(err) {
		return
	} else if err != nil {
		k.flaw("cleanup: %v", err)
		return
	}
	if k.Generic {
		return // where it keeps its directories is its own business
	}
	known := map[string]bool{}
	for name, seen := range k.Committed {
		switch dir := k.dirOf(name); {
		case dir != "":
			known[filepath.Dir(dir)] = true
		case seen.Denied != nil || seen.Diff != "":
			return // its directory is not known, and would be taken for an orphan
		}
	}
	for _, dir := range k.dirs {
		known[filepath.Dir(dir)] = true
	}
	for key := range k.Active {
		dir := k.dirOf(key)
		if dir == "" {
			return // a view, the same
		}
		known[filepath.Dir(dir)] = true
	}
	for _, sub := range []string{"snapshots", "removing", "healing"} {
		entries, err := os.ReadDir(filepath.Join(k.root, sub))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			k.flaw("%v", err)
		}
		for _, e := range entries {
			if path := filepath.Join(k.root, sub, e.Name()); !known[path] {
				k.flaw("orphan after cleanup: %s", filepath.Join(sub, e.Name()))
			}
		}
	}
}

// again starts a second time: recovery of what recovery left must change
// nothing.
func (k *examination) again(ctx context.Context, before map[string]snapshots.Info) {
	k.boot()
	s, err := k.Subject.Start(ctx, k.root)
	if err != nil {
		k.flaw("second start: %v", err)
		return
	}
	after, err := list(ctx, s)
	if err != nil {
		k.flaw("second start: walk: %v", err)
	}
	for name, info := range before {
		if now, ok := after[name]; !ok || now.Kind != info.Kind || now.Parent != info.Parent {
			k.flaw("second start: %q was %s on %q, and is %s on %q", name, info.Kind, info.Parent, now.Kind, now.Parent)
		}
	}
	for name := range after {
		if _, ok := before[name]; !ok {
			k.flaw("second start: %q appeared", name)
		}
	}
	k.answersAgain(ctx, s)
	if err := s.Close(); err != nil {
		k.flaw("second close: %v", err)
	}
}

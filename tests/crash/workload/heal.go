package workload

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// The chains of a plan for healing. Those before first are unpacked, and then
// damaged, before the recording begins.
const (
	queried  = iota // damaged, and used
	removed         // damaged, and its top is removed while it heals
	hopeless        // damaged, and one layer has no blob any more
	retaken         // damaged, and extracted again under the names it has
	first           // this one and further ones are unpacked meanwhile
)

// Sizes of plans for healing: with other work meanwhile, and without, when no
// sync of others can hide that one is missing.
var (
	Healing      = Size{Chains: first + 2, Layers: 3}
	HealingAlone = Size{Chains: retaken, Layers: 3}
)

// Old chains are those that are there, and damaged, from the beginning.
func (p *Plan) Old() []Chain { return p.Chains[:min(first, len(p.Chains))] }

// alone reports whether nothing else happens while damaged layers heal.
func (p *Plan) alone() bool { return len(p.Chains) == HealingAlone.Chains }

// Hopeless is the layer whose blob is to be missing.
func (p *Plan) Hopeless() *Layer { return p.Chains[hopeless].Layers[1] }

// hasContainer reports whether an old chain has a container.
func hasContainer(chain int, bare bool) bool { return chain != removed && chain != retaken && !bare }

// containerOf is the key of a container of before the recording.
func (c *Chain) containerOf() string {
	return fmt.Sprintf("%s/old-container-%s", c.Namespace, c.Top().DiffID.Encoded()[:8])
}

// Unpack unpacks the old chains, each with a container unless bare, and returns
// the record and the trees of the layers.
func (r *Runner) Unpack(ctx context.Context, bare bool) (_ *Record, dirs map[string]string, err error) {
	r.record, dirs = NewRecord(), map[string]string{}
	r.record.Hopeless = []string{r.Plan.Hopeless().Name}
	for i := range r.Plan.Old() {
		c := &r.Plan.Chains[i]
		ctx := namespaces.WithNamespace(ctx, c.Namespace)
		if err := r.unpackAll(ctx, c, fmt.Sprintf("%d-old", i)); err != nil {
			return nil, nil, err
		}
		if err := r.mounted(ctx, fmt.Sprintf("%s/old-view-%d", c.Namespace, i), c.Top(), r.rememberMerged); err != nil {
			return nil, nil, err
		}
		key := fmt.Sprintf("%s/old-dirs-%d", c.Namespace, i)
		mounts, err := r.Snapshotter.View(ctx, key, c.Top().Name)
		if err != nil {
			return nil, nil, err
		}
		_, lower, err := Directories(mounts)
		if err != nil || len(lower) != len(c.Layers) {
			return nil, nil, fmt.Errorf("the mounts %v do not show %d layers: %w", mounts, len(c.Layers), err)
		}
		for n, l := range c.Layers {
			dirs[l.Name] = lower[len(lower)-1-n]
		}
		if err := r.Snapshotter.Remove(ctx, key); err != nil {
			return nil, nil, err
		}
		if hasContainer(i, bare) {
			if err := r.container(ctx, c.containerOf(), c.Top()); err != nil {
				return nil, nil, err
			}
		}
	}
	return r.record, dirs, nil
}

// Remind marks what Unpack was promised, in a log that begins after it.
func (r *Runner) Remind(bare bool) error {
	var errs []error
	for i, c := range r.Plan.Old() {
		for _, l := range c.Layers {
			errs = append(errs, r.mark(Ack, Report, l.Name, ""))
		}
		if hasContainer(i, bare) {
			errs = append(errs, r.mark(Ack, Prepare, c.containerOf(), ""))
		}
	}
	return errors.Join(errs...)
}

// QueryOne calls Stat of one damaged layer only.
func (r *Runner) QueryOne(ctx context.Context) error {
	base := r.Plan.Chains[queried].Layers[0].Name
	if _, err := r.Snapshotter.Stat(ctx, base); err != nil {
		return fmt.Errorf("stat %q: %w", base, err)
	}
	return nil
}

// QueryAll calls Stat of every damaged layer, with a deadline for each. What is answered does
// not matter.
func (r *Runner) QueryAll(ctx context.Context) {
	for _, c := range r.Plan.Old() {
		for _, l := range c.Layers {
			ctx, stop := context.WithTimeout(ctx, 10*time.Second)
			_, _ = r.Snapshotter.Stat(ctx, l.Name)
			stop()
		}
	}
}

// QueryAgain queries an image that was healed before.
func (r *Runner) QueryAgain(ctx context.Context) error {
	return r.query(ctx, &r.Plan.Chains[queried], "queried-again")
}

// Heal queries all that is damaged, in every way that the API has, and does
// other things meanwhile. root is that of the snapshotter, dirs is what Unpack
// has returned.
func (r *Runner) Heal(ctx context.Context, root string, dirs map[string]string) error {
	jobs := []func() error{
		func() error { return r.queryMany(ctx, &r.Plan.Chains[queried]) },
		func() error { return r.queryHopeless(ctx, &r.Plan.Chains[hopeless], "hopeless") },
	}
	if r.Plan.alone() {
		jobs = append(jobs, func() error { return r.query(ctx, &r.Plan.Chains[removed], "queried") })
	} else {
		top := r.Plan.Chains[removed].Top()
		// Its number, and the boot.
		beside := filepath.Join(root, "healing", filepath.Base(filepath.Dir(dirs[top.Name]))+".*")
		jobs = append(jobs,
			func() error { return r.removeHealing(ctx, &r.Plan.Chains[removed], beside) },
			func() error { return r.retake(ctx, &r.Plan.Chains[retaken]) })
	}
	for i := first; i < len(r.Plan.Chains); i++ {
		jobs = append(jobs, func() error { return r.chain(ctx, &r.Plan.Chains[i], i) })
	}
	errs := make([]error, len(jobs))
	var running sync.WaitGroup
	for i, job := range jobs {
		running.Go(func() { errs[i] = job() })
	}
	running.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("workload: %w", err)
	}
	return nil
}

// query uses the image of a chain in every way: all of them wait until it is
// whole.
func (r *Runner) query(ctx context.Context, c *Chain, unique string) error {
	ctx = namespaces.WithNamespace(ctx, c.Namespace)
	top, key := c.Top(), fmt.Sprintf("%s/%s-%s", c.Namespace, unique, c.Top().DiffID.Encoded()[:8])
	if _, err := r.Snapshotter.Stat(ctx, top.Name); err != nil {
		return fmt.Errorf("stat %q: %w", top.Name, err)
	}
	if err := r.container(ctx, key, top); err != nil {
		return err
	}
	if _, err := r.Snapshotter.Mounts(ctx, key); err != nil {
		return fmt.Errorf("mounts %q: %w", key, err)
	}
	if err := r.mounted(ctx, key+"-view", top, r.compareMerged); err != nil {
		return err
	}
	return r.Remove(ctx, key)
}

// compareMerged wants to see what was seen before the damage.
func (r *Runner) compareMerged(l *Layer, tree kit.Tree) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if diff := kit.Diff(r.record.Merged[l.Name], tree, 3); diff != "" && !r.Gullible {
		return fmt.Errorf("healed, and not what it was: %s:\n%s", l.Name, diff)
	}
	return nil
}

// queryMany has several goroutines query the same image at once.
func (r *Runner) queryMany(ctx context.Context, c *Chain) error {
	errs := make([]error, 3)
	var running sync.WaitGroup
	for i := range errs {
		running.Go(func() { errs[i] = r.query(ctx, c, fmt.Sprintf("queried-%d", i)) })
	}
	running.Wait()
	return errors.Join(errs...)
}

// QueryHopeless queries once more the image that cannot be healed.
func (r *Runner) QueryHopeless(ctx context.Context, unique string) error {
	return r.queryHopeless(ctx, &r.Plan.Chains[hopeless], unique)
}

// queryHopeless queries an image that cannot be healed.
func (r *Runner) queryHopeless(ctx context.Context, c *Chain, unique string) error {
	ctx = namespaces.WithNamespace(ctx, c.Namespace)
	top, key := c.Top(), c.Namespace+"/"+unique
	_, statErr := r.Snapshotter.Stat(ctx, top.Name)
	_, prepareErr := r.Prepare(ctx, key, top.Name)
	for what, err := range map[string]error{"stat": statErr, "prepare": prepareErr} {
		if !r.Gullible && !errdefs.IsFailedPrecondition(err) {
			return fmt.Errorf("%s of a layer that is damaged and has no blob: %w, want failed precondition", what, err)
		}
	}
	return nil
}

// removeHealing removes the top of a chain while it is extracted beside itself,
// and unpacks it again.
func (r *Runner) removeHealing(ctx context.Context, c *Chain, beside string) error {
	ctx = namespaces.WithNamespace(ctx, c.Namespace)
	top := c.Top()
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		// Its answer depends on who is faster.
		_, _ = r.Snapshotter.Stat(ctx, top.Name)
	}()
	midway := r.waitFor(beside, answered)
	r.mu.Lock()
	r.record.Midway = r.record.Midway || midway
	r.mu.Unlock()
	if err := r.Remove(ctx, top.Name); err != nil {
		return err
	}
	if err := r.Snapshotter.(snapshots.Cleaner).Cleanup(ctx); err != nil {
		return fmt.Errorf("cleanup: %w", err)
	}
	<-answered
	if err := r.unpack(ctx, top, "removed-again"); err != nil {
		return err
	}
	return r.query(ctx, c, "queried-removed")
}

// retake extracts a chain under the names that it has, as containerd does when it has
// lost them: while it is damaged or heals, and once more when it is whole. Its layers
// are there all the time, but for those on one that is replaced.
func (r *Runner) retake(ctx context.Context, c *Chain) error {
	ctx = namespaces.WithNamespace(ctx, c.Namespace)
	for _, l := range c.Layers[1:] {
		if err := r.mark(Begin, Remove, l.Name, ""); err != nil {
			return err
		}
	}
	for _, unique := range []string{"retaken", "retaken-whole"} {
		if err := r.unpackAll(ctx, c, unique); err != nil {
			return err
		}
		if err := r.query(ctx, c, "queried-"+unique); err != nil {
			return err
		}
	}
	return nil
}

// waitFor waits until a path matches, and is false when it is too late.
func (r *Runner) waitFor(pattern string, tooLate <-chan struct{}) bool {
	tick := time.NewTicker(200 * time.Microsecond)
	defer tick.Stop()
	for {
		if found, _ := filepath.Glob(pattern); len(found) > 0 {
			return true
		}
		select {
		case <-tooLate:
			return false
		case <-tick.C:
		}
	}
}

// Others is what other programs write while a machine goes down, or comes up: a
// log, synced line by line.
func Others(dir string) (err error) {
	f, err := os.OpenFile(filepath.Join(dir, "others.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for i := range 12 {
		if _, err := fmt.Fprintln(f, "line", i); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	return nil
}

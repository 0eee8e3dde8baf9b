package workload

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Record is what must be known to judge a disk afterwards.
type Record struct {
	Trees  map[string]kit.Tree // by committed name: the layer after its extraction; all below it, too, if Generic
	Merged map[string]kit.Tree // by name of a chain's top: what a container sees

	// Damaged layers, by committed name, and what was done to them by hand before
	// the recording began. Those that are Hopeless, too, have no blob out of which
	// they could be healed.
	Damaged  map[string]string
	Hopeless []string
	// Corrupt are those of the damaged layers of which only content was changed:
	// nothing but a comparison of content can find it.
	Corrupt []string
	Midway  bool // a layer was removed while it was being extracted again
}

// NewRecord returns an empty record.
func NewRecord() *Record {
	return &Record{Trees: map[string]kit.Tree{}, Merged: map[string]kit.Tree{}, Damaged: map[string]string{}}
}

// Runner carries out a plan.
type Runner struct {
	Snapshotter snapshots.Snapshotter
	Marks       Marker
	Plan        *Plan
	Sync        bool   // extract with containerd's own sync
	Patient     bool   // try again for a while when a parent is not there yet
	Generic     bool   // read layers through mounts only, not into directories
	Gullible    bool   // do not mind a yes about a layer that is not whole
	Parallel    bool   // extract the layers of a chain side by side, and name the parents at Commit
	Scratch     string // directory for mount points, not on the disk
	// Applier is the snapshotter's own, which extracts the layers; nil: containerd's does.
	Applier diff.Applier

	mu     sync.Mutex // guards record
	record *Record
}

// Run does it all and returns the record. An error of the snapshotter ends it:
// on a disk without faults there is none.
func (r *Runner) Run(ctx context.Context) (*Record, error) {
	r.record = NewRecord()
	errs := make([]error, len(r.Plan.Chains))
	var running sync.WaitGroup
	for i := range r.Plan.Chains {
		running.Go(func() { errs[i] = r.chain(ctx, &r.Plan.Chains[i], i) })
	}
	running.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("workload: %w", err)
	}
	return r.record, nil
}

// chain is the life of one image on a node.
func (r *Runner) chain(ctx context.Context, c *Chain, n int) error {
	ctx = namespaces.WithNamespace(ctx, c.Namespace)
	if err := r.unpackAll(ctx, c, fmt.Sprintf("%d-first", n)); err != nil {
		return err
	}
	top := c.Top()
	container := fmt.Sprintf("%s/container-%d", c.Namespace, n)
	if err := r.container(ctx, container, top); err != nil {
		return err
	}
	if err := r.mounted(ctx, fmt.Sprintf("%s/view-%d", c.Namespace, n), top, r.rememberMerged); err != nil {
		return err
	}
	if c.Remove {
		if err := r.Remove(ctx, container); err != nil {
			return err
		}
		if err := r.Remove(ctx, top.Name); err != nil {
			return err
		}
		if cleaner, ok := r.Snapshotter.(snapshots.Cleaner); ok {
			if err := cleaner.Cleanup(ctx); err != nil && !errdefs.IsNotImplemented(err) {
				return fmt.Errorf("cleanup: %w", err)
			}
		}
		if err := r.unpack(ctx, top, fmt.Sprintf("%d-second", n)); err != nil {
			return err
		}
	}
	return r.abandon(ctx, top, fmt.Sprintf("%d-abandoned", n))
}

func (r *Runner) unpackAll(ctx context.Context, c *Chain, unique string) error {
	if !r.Parallel {
		for _, l := range c.Layers {
			if err := r.unpack(ctx, l, unique); err != nil {
				return err
			}
		}
		return nil
	}
	// As containerd does it with the capability "rebase": everything but the
	// commits, which come in order.
	errs := make([]error, len(c.Layers))
	var running sync.WaitGroup
	for i, l := range c.Layers {
		running.Go(func() { errs[i] = r.extract(ctx, l, unique) })
	}
	running.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, l := range c.Layers {
		if err := r.Commit(ctx, l, l.Key(unique), snapshots.WithParent(l.Parent)); err != nil {
			return err
		}
	}
	return nil
}

func (r *Runner) extract(ctx context.Context, l *Layer, unique string) error {
	mounts, err := r.Prepare(ctx, l.Key(unique), "", l.Labels())
	if err != nil {
		return err
	}
	if r.Applier != nil {
		return r.apply(ctx, l, l.Key(unique), mounts)
	}
	if err := l.Extract(ctx, mounts, r.Sync); err != nil {
		return err
	}
	tree, err := TreeOf(mounts)
	if err != nil {
		return err
	}
	return r.remember(l, tree)
}

// apply has the snapshotter's own applier extract a layer. What it is to be is what
// containerd's makes of it elsewhere, because it may not be in its place yet.
func (r *Runner) apply(ctx context.Context, l *Layer, key string, mounts []mount.Mount) error {
	tree, err := l.Reference(ctx, r.Scratch)
	if err != nil {
		return err
	}
	if err := r.remember(l, tree); err != nil {
		return err
	}
	if err := l.Apply(ctx, r.Applier, mounts); err != nil || !l.Late {
		return err
	}
	if mounts, err = r.Snapshotter.Mounts(ctx, key); err != nil {
		return err
	}
	return l.writeLate(mounts)
}

// unpack prepares, extracts and commits a layer.
func (r *Runner) unpack(ctx context.Context, l *Layer, unique string) error {
	key := l.Key(unique)
	mounts, err := r.Prepare(ctx, key, l.Parent, l.Labels())
	if err != nil {
		return err
	}
	if r.Applier != nil {
		if err := r.apply(ctx, l, key, mounts); err != nil {
			return err
		}
		return r.Commit(ctx, l, key)
	}
	if err := l.Extract(ctx, mounts, r.Sync); err != nil {
		return err
	}
	if r.Generic {
		// Only when it is committed: the mount that shows it is a view, because
		// to unmount what can be written to may sync it.
		if err := r.Commit(ctx, l, key); err != nil {
			return err
		}
		return r.mounted(ctx, key+"-view", l, func(l *Layer, tree kit.Tree) error {
			return r.remember(l, Dateless(tree))
		})
	}
	tree, err := TreeOf(mounts)
	if err != nil {
		return err
	}
	if err := r.remember(l, tree); err != nil {
		return err
	}
	return r.Commit(ctx, l, key)
}

// remember keeps the fingerprint of an extracted layer. A second extraction of
// the same layer must be equal to the first, or the judgement would depend on
// which of them a crash left.
func (r *Runner) remember(l *Layer, tree kit.Tree) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if before, ok := r.record.Trees[l.Name]; ok {
		if diff := kit.Diff(before, tree, 3); diff != "" {
			return fmt.Errorf("two extractions of %s differ:\n%s", l.Name, diff)
		}
	}
	r.record.Trees[l.Name] = tree
	return nil
}

// rememberMerged keeps what a container on the layer sees.
func (r *Runner) rememberMerged(l *Layer, tree kit.Tree) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.record.Merged[l.Name] = tree
	return nil
}

// TreeOf is the fingerprint of the directory that the mounts write to.
func TreeOf(mounts []mount.Mount) (kit.Tree, error) {
	upper, _, err := Directories(mounts)
	if err != nil {
		return nil, err
	}
	return Tree(upper)
}

// Tree is the fingerprint of a layer. The times of its root and of whiteouts are
// left out: they are those of the extraction, no tar names them.
func Tree(dir string) (kit.Tree, error) {
	t, err := kit.Fingerprint(dir)
	if err != nil {
		return nil, err
	}
	t.Untime(".")
	for name, node := range t {
		if node.Mode&fs.ModeCharDevice != 0 && node.Rdev == 0 {
			t.Untime(name)
		}
	}
	return t, nil
}

// container prepares a container on the layer and writes something into it.
// What it writes is promised to no client.
func (r *Runner) container(ctx context.Context, key string, top *Layer) error {
	mounts, err := r.Prepare(ctx, key, top.Name)
	if err != nil {
		return err
	}
	if r.Generic {
		return nil
	}
	upper, _, err := Directories(mounts)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(upper, "log"), []byte("not promised\n"), 0o600)
}

// mounted mounts a view of the layer, hands on what a container sees, and removes
// it again.
func (r *Runner) mounted(ctx context.Context, key string, l *Layer, seen func(*Layer, kit.Tree) error) error {
	if err := r.mark(Begin, Prepare, key, ""); err != nil {
		return err
	}
	mounts, err := r.Snapshotter.View(ctx, key, l.Name)
	if err := r.answer(err, Prepare, key, ""); err != nil {
		return err
	}
	tree, err := Merged(mounts, r.Scratch)
	if err != nil {
		return err
	}
	if err := seen(l, tree); err != nil {
		return err
	}
	return r.Remove(ctx, key)
}

// Merged is the fingerprint of what a container sees in the mounts.
func Merged(mounts []mount.Mount, scratch string) (_ kit.Tree, err error) {
	dir, err := os.MkdirTemp(scratch, "merged")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	if err := mount.All(mounts, dir); err != nil {
		return nil, fmt.Errorf("mount %v: %w", mounts, err)
	}
	defer func() { err = errors.Join(err, mount.UnmountAll(dir, 0)) }()
	return Tree(dir)
}

// Dateless leaves the times of directories out. A snapshotter that copies its
// parents, which is good enough for the API, gives them new ones.
func Dateless(t kit.Tree) kit.Tree {
	for name, node := range t {
		if node.Mode.IsDir() {
			t.Untime(name)
		}
	}
	return t
}

// abandon extracts a layer under another key and never commits it, as a pull
// does that lost its client.
func (r *Runner) abandon(ctx context.Context, l *Layer, unique string) error {
	mounts, err := r.Prepare(ctx, l.Key(unique), l.Parent, l.Labels())
	if err != nil {
		return err
	}
	if r.Applier != nil {
		return r.apply(ctx, l, l.Key(unique), mounts)
	}
	return l.Extract(ctx, mounts, false)
}

// Prepare calls Prepare, with marks.
func (r *Runner) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	if err := r.mark(Begin, Prepare, key, ""); err != nil {
		return nil, err
	}
	mounts, err := r.Snapshotter.Prepare(ctx, key, parent, opts...)
	for deadline := time.Now().Add(5 * time.Second); r.Patient && errdefs.IsNotFound(err) && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
		mounts, err = r.Snapshotter.Prepare(ctx, key, parent, opts...)
	}
	return mounts, r.answer(err, Prepare, key, "")
}

// Commit calls Commit, with marks.
func (r *Runner) Commit(ctx context.Context, l *Layer, key string, opts ...snapshots.Opt) error {
	if err := r.mark(Begin, Commit, l.Name, key); err != nil {
		return err
	}
	return r.answer(r.Snapshotter.Commit(ctx, l.Name, key, append(opts, l.Labels())...), Commit, l.Name, key)
}

// Remove calls Remove, with marks.
func (r *Runner) Remove(ctx context.Context, name string) error {
	if err := r.mark(Begin, Remove, name, ""); err != nil {
		return err
	}
	return r.answer(r.Snapshotter.Remove(ctx, name), Remove, name, "")
}

// answer marks how a call ended.
func (r *Runner) answer(err error, op Op, name, key string) error {
	phase := Ack
	if err != nil {
		phase = Fail
		err = fmt.Errorf("%s %q: %w", op, name, err)
	}
	return errors.Join(err, r.mark(phase, op, name, key))
}

func (r *Runner) mark(phase Phase, op Op, name, key string) error {
	_, err := r.Marks.Mark(Mark{Phase: phase, Op: op, Name: name, Key: key}.Text())
	return err
}

// Idle waits until the file system has written in the background what it would
// write by itself: ext4 commits its journal every 5 s. Those writes belong to
// the log too.
func Idle(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(6500 * time.Millisecond):
		return nil
	}
}

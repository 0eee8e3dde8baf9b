package full

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Setup is what an experiment is made of.
type Setup struct {
	FS      disk.FS
	Size    int64    // of the disk; enough for the images when 0
	Options []string // mount options, of the workload and of the examinations
	Seed    uint64
	// Daemon is the snapshotter that does the work. Without a command it is
	// containerd's built-in overlayfs, the control.
	Daemon oracle.Process
	// Interrupted chooses the workload of clients that go away.
	Interrupted bool
	Damage      Damage // chooses the workload of a node with damaged layers
	Rounds      int    // of the workload; 10 when 0
	Name        string // of the subject, for names of states; ByCRI has the CRI plugin pull
}

// ByCRI is the name of the subject whose images are pulled by containerd's CRI plugin.
const ByCRI = "cri"

// The directories on the disk.
const (
	containerdDir  = "containerd"
	snapshotterDir = "root"
)

// Marks of our own: the power may go from markStart on; images are pulled and
// removed.
const (
	markStart = "start"

	opPull   workload.Op = "pull"
	opDelete workload.Op = "delete"
)

// Recording is a workload that was done, with all that is needed to cut its
// power later.
type Recording struct {
	*lab.Recording
	Snapshotter string // containerd's name for it
	Interrupts  Interrupts
	Damage      Damage
	bench       *Bench
	before      promise // what was promised when the log began
}

// Record has a node do the workload on a recording disk.
func (b *Bench) Record(ctx context.Context, s Setup) (_ *Recording, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("record %s on %s, seed %d: %w", s.Name, s.FS, s.Seed, err)
		}
	}()
	if s.Size == 0 {
		s.Size = max(s.FS.MinSize(), 256<<20)
	}
	if s.Rounds == 0 {
		s.Rounds = 10
	}
	d, err := disk.Start(s.Size)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := errors.Join(d.Format(s.FS), d.DropCache()); err != nil {
		return nil, err
	}
	var i *injury
	if s.Damage != NoDamage {
		if i, err = b.injure(ctx, s, d); err != nil {
			return nil, err
		}
	}
	r, err := b.record(ctx, s, d, promise{}, i)
	if err != nil {
		return nil, err
	}
	return r, r.sound()
}

// record has a node work on a disk as it is. i is what was damaged on it, nil if
// nothing was.
func (b *Bench) record(ctx context.Context, s Setup, d *disk.Disk, before promise, i *injury) (_ *Recording, err error) {
	scratch, err := os.MkdirTemp("", "record")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	kept := &lab.Recording{FS: s.FS, Options: s.Options, Seed: s.Seed, Subject: s.Name}
	if kept.Base, err = state.ReadImage(d); err != nil {
		return nil, err
	}
	mountpoint := filepath.Join(scratch, "disk")
	if err := errors.Join(d.Reset(), os.Mkdir(mountpoint, 0o700), d.Mount(s.FS, mountpoint, s.Options...)); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Unmount()) }()
	w := &worker{bench: b, setup: s, disk: d, scratch: scratch, mountpoint: mountpoint, second: before.path != nil, injury: i}
	if i != nil {
		kept.Record = i.record
		if err := w.remind(i); err != nil {
			return nil, err
		}
	}
	if kept.Start, err = d.Mark(markStart); err != nil {
		return nil, err
	}
	entries, err := w.work(ctx)
	if err != nil {
		return nil, err
	}
	if kept.Stats, err = d.Stats(); err != nil {
		return nil, err
	}
	kept.Log = state.NewLog(entries)
	r := b.Adopt(kept)
	r.Snapshotter, r.Interrupts, r.Damage, r.before = w.snapshotter(), w.interrupts, s.Damage, before
	for _, m := range before.marks {
		r.remember(m)
	}
	return r, nil
}

// Adopt makes a Recording out of one that lab.Load has read, or out of the base,
// the log and the other fields that Record sets: the fingerprints are those of
// the bench, and the rest stands in the marks.
func (b *Bench) Adopt(kept *lab.Recording) *Recording {
	r := &Recording{Recording: kept, Snapshotter: builtIn, bench: b}
	r.Marks = workload.Marks(kept.Log.Entries)
	record := workload.NewRecord()
	if kept.Record != nil && len(kept.Record.Damaged) > 0 {
		record.Damaged, record.Hopeless, r.Damage = kept.Record.Damaged, kept.Record.Hopeless, Damaged
	}
	r.Record = record
	var layers []*workload.Layer
	names := map[digest.Digest]string{}
	for _, m := range r.Marks {
		switch m.Op {
		case workload.Commit:
		case workload.Report:
			id := chainID(m.Name)
			names[id] = m.Name
			layers = append(layers, &workload.Layer{Name: m.Name, ChainID: id.String()})
		default:
			continue
		}
		r.Snapshotter = proxied // nothing stands before the built-in one, and marks
		r.remember(m)
	}
	for _, l := range layers {
		if own := b.layers[digest.Digest(l.ChainID)]; own != nil {
			l.Parent = names[own.parent]
		}
	}
	r.Plan = workload.PlanOf(kept.Seed, layers)
	return r
}

// remember notes the reference of the layer of a Commit, or of one of before.
func (r *Recording) remember(m workload.Mark) {
	if l, ok := r.bench.layers[chainID(m.Name)]; ok && (m.Op == workload.Commit || m.Op == workload.Report) {
		r.Record.Trees[m.Name] = l.tree
	}
}

// sound checks that the recording can prove anything at all.
func (r *Recording) sound() error {
	pulls, commits, strange, removed := 0, 0, 0, false
	for _, m := range r.Marks {
		switch {
		case m.Phase == workload.Ack && m.Op == opPull:
			pulls++
		case m.Phase == workload.Ack && m.Op == workload.Commit:
			commits++
			if r.Record.Trees[m.Name] == nil {
				strange++
			}
		case m.Phase == workload.Ack && m.Op == workload.Report:
			commits++
		case m.Phase == workload.Ack && m.Op == workload.Remove:
			removed = removed || slices.Contains(r.Record.Hopeless, m.Name)
		}
	}
	switch {
	case r.Stats.Overflow:
		return fmt.Errorf("the log has reached its limit: %w", lab.ErrBroken)
	case r.Stats.Flushes == 0:
		return fmt.Errorf("no flush has arrived: %w", lab.ErrBroken)
	case pulls < len(r.bench.images):
		return fmt.Errorf("%d pulls acknowledged of %d images: %w", pulls, len(r.bench.images), lab.ErrBroken)
	case r.Snapshotter == proxied && commits < len(r.bench.layers):
		return fmt.Errorf("%d commits acknowledged of %d layers: %w", commits, len(r.bench.layers), lab.ErrBroken)
	case r.Damage == Damaged && !removed:
		return fmt.Errorf("no layer without a good blob was dropped: %w", lab.ErrBroken)
	case strange > 0:
		return fmt.Errorf("%d commits of layers that no image has: %w", strange, lab.ErrBroken)
	}
	return nil
}

// worker is a node at work.
type worker struct {
	bench               *Bench
	setup               Setup
	disk                *disk.Disk
	scratch, mountpoint string
	node                *node
	daemon              *oracle.Running
	injury              *injury   // nil when nothing was damaged
	inventory           inventory // what containerd had when it was booted, if something was
	second              bool      // the disk is that of a crash
	interrupts          Interrupts
	usual               time.Duration // of a pull
}

// work boots the node, has it work, takes the log, and pulls the plug.
func (w *worker) work(ctx context.Context) (_ []disk.Entry, err error) {
	stopDaemon, err := w.startDaemon(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, stopDaemon()) }()
	if w.node, err = w.bench.boot(ctx, w.snapshotter(), filepath.Join(w.mountpoint, containerdDir), w.address(), w.run(), w.setup.Name == ByCRI); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.node.stop()) }()

	do := w.orderly
	switch {
	case w.second:
		do = w.again
	case w.injury != nil:
		do = w.mend
	case w.setup.Interrupted:
		do = w.interrupted
	}
	if err := do(ctx); err != nil {
		return nil, err
	}
	return w.disk.Log(0)
}

func (w *worker) snapshotter() string {
	if w.setup.Daemon.Command == nil {
		return builtIn
	}
	return proxied
}

// address is where containerd finds the proxied snapshotter.
func (w *worker) address() string { return filepath.Join(w.scratch, "between") }

// run is the directory of containerd's sockets.
func (w *worker) run() string { return filepath.Join(w.scratch, "run") }

// examine finds out what containerd has before a boot.
func (w *worker) examine() error {
	m, err := readMetadata(filepath.Join(w.mountpoint, containerdDir, metaDB))
	if err != nil {
		return err
	}
	good, err := w.bench.goodBlobs(w.mountpoint)
	if err != nil {
		return err
	}
	w.inventory = w.bench.inventory(m, good, w.injury.record)
	return kit.NewBoot()
}

// startDaemon starts the daemon, if there is one, and what stands before it.
func (w *worker) startDaemon(ctx context.Context) (stop func() error, err error) {
	if w.snapshotter() == builtIn {
		return func() error { return nil }, nil
	}
	program := w.setup.Daemon
	if w.injury != nil {
		program = serving(program, w.run(), w.setup.Damage)
		if err := w.examine(); err != nil {
			return nil, err
		}
	}
	daemon, err := program.Launch(ctx, filepath.Join(w.mountpoint, snapshotterDir))
	if err != nil {
		return nil, err
	}
	w.daemon = daemon
	between, err := listenBetween(w.address(), w.setup.Daemon.Address, w.disk)
	if err != nil {
		return nil, errors.Join(err, daemon.Kill())
	}
	return func() error { return errors.Join(between.Close(), daemon.Kill()) }, nil
}

// mark marks something that is done in containerd.
func (w *worker) mark(phase workload.Phase, op workload.Op, ref string) error {
	_, err := w.disk.Mark(workload.Mark{Phase: phase, Op: op, Name: ref}.Text())
	return err
}

// pull pulls an image, with marks.
func (w *worker) pull(ctx context.Context, ref string) error {
	return w.marked(opPull, ref, func() error { return w.node.pull(ctx, ref) })
}

// remove removes an image, with marks.
func (w *worker) remove(ctx context.Context, ref string) error {
	return w.marked(opDelete, ref, func() error { return w.node.remove(ctx, ref) })
}

func (w *worker) marked(op workload.Op, ref string, do func() error) error {
	if err := w.mark(workload.Begin, op, ref); err != nil {
		return err
	}
	err := do()
	phase := workload.Ack
	if err != nil {
		phase = workload.Fail
	}
	return errors.Join(err, w.mark(phase, op, ref))
}

// limit bounds one operation of containerd: a hang must show up as that.
const limit = time.Minute

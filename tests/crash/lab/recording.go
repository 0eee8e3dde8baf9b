package lab

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// ErrBroken means that the experiment, not the snapshotter, went wrong.
var ErrBroken = errors.New("the harness is broken")

// Setup is what an experiment is made of.
type Setup struct {
	FS      disk.FS
	Size    int64    // of the disk; the smallest that the file system takes when 0
	Options []string // mount options, of the workload and of the examinations
	Seed    uint64
	Layers  workload.Size
	Daemon  oracle.Process // the snapshotter that does the work
	Sync    bool           // containerd's own sync at the end of each extraction
	Idle    bool           // go on recording until background writes are over
	Patient bool           // try again for a parent that is not there yet
	Generic bool           // read layers through mounts only: a snapshotter whose directories are not known
	// Parallel extracts the layers of a chain side by side, and names their
	// parents at Commit.
	Parallel bool
	// Differ has the snapshotter's own diff service extract the layers. With Late, something
	// is written to each of them after that.
	Differ, Late bool
	// Lazy is a disk that takes its time for some writes of data, and does what comes later
	// meanwhile: what is not waited for is not there yet when the journal is.
	Lazy bool

	Heal *Heal  // layers are damaged from the beginning, and heal
	Name string // of the subject, for names of states
}

// laziness is how long a lazy disk takes for each lazyEvery-th write of data. The others, of
// which some belong to a Commit, do not wait for them.
const (
	laziness  = 500 * time.Millisecond
	lazyEvery = 12
)

// mark of the first point at which the power may go: the file system is mounted
// and the snapshotter is about to start for the first time.
const markStart = "start"

// Recording is a workload that was done, with all that is needed to cut its
// power later.
type Recording struct {
	FS      disk.FS
	Options []string
	Seed    uint64
	Layers  workload.Size
	Subject string
	Start   int // the first point
	Base    *state.Image
	Log     *state.Log
	Marks   []workload.Mark
	Plan    *workload.Plan
	Record  *workload.Record
	Stats   disk.Stats
	Generic bool // layers were read through mounts
}

// rootName is the directory of the snapshotter on the disk.
const rootName = "root"

// Record does the workload and returns the recording.
func Record(ctx context.Context, s Setup) (_ *Recording, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("record %s on %s, seed %d: %w", s.Name, s.FS, s.Seed, err)
		}
	}()
	if s.Size == 0 {
		s.Size = s.FS.MinSize()
	}
	if s.Layers == (workload.Size{}) {
		s.Layers = workload.Small
		if s.Heal != nil {
			s.Layers = workload.Healing
		}
	}
	r := &Recording{FS: s.FS, Options: s.Options, Seed: s.Seed, Layers: s.Layers, Subject: s.Name, Generic: s.Generic}
	if r.Plan, err = workload.NewPlan(s.Seed, s.Layers); err != nil {
		return nil, err
	}
	for _, c := range r.Plan.Chains {
		for _, l := range c.Layers {
			l.Late = s.Late
		}
	}
	start := disk.Start
	if s.Lazy {
		start = disk.StartQueued
	}
	d, err := makeSite(s.FS, s.Size, start)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	h := &healing{Setup: s, r: r, site: d}
	if s.Heal != nil {
		if err := h.before(ctx); err != nil {
			return nil, err
		}
	}
	if err := d.begin(r); err != nil {
		return nil, err
	}
	if s.Heal != nil {
		if err := h.runner.Remind(h.bare()); err != nil {
			return nil, err
		}
	}
	if s.Lazy {
		journal, err := d.Journal(s.FS)
		if err != nil {
			return nil, err
		}
		if _, err := d.Inject(disk.Fault{Op: disk.OpWrite, Ranges: d.Outside(journal), Every: lazyEvery, Stall: laziness}); err != nil {
			return nil, err
		}
	}
	if r.Start, err = d.Mark(markStart); err != nil {
		return nil, err
	}
	if s.Heal != nil {
		err = h.work(ctx)
	} else {
		err = r.work(ctx, s, d)
	}
	if err != nil {
		return nil, err
	}
	if r.Stats, err = d.Stats(); err != nil {
		return nil, err
	}
	return r, r.Sound()
}

// work runs the daemon and the workload, takes the log, and pulls the plug.
func (r *Recording) work(ctx context.Context, s Setup, d *site) (err error) {
	if s.Differ {
		if err := useStore(&s.Daemon, r.Plan, filepath.Join(d.scratch, "content")); err != nil {
			return err
		}
	}
	daemon, err := s.Daemon.Launch(ctx, filepath.Join(d.mountpoint, rootName))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, daemon.Kill()) }()
	runner := &workload.Runner{Snapshotter: daemon, Marks: d, Plan: r.Plan, Sync: s.Sync, Patient: s.Patient, Generic: s.Generic, Parallel: s.Parallel, Scratch: d.scratch}
	if s.Differ {
		runner.Applier = daemon.Applier()
	}
	if r.Record, err = runner.Run(ctx); err != nil {
		return err
	}
	if s.Idle {
		if err := workload.Idle(ctx); err != nil {
			return err
		}
	}
	return d.takeLog(r)
}

// useStore gives a daemon a content store with all layers of a plan, which is not on the
// disk under test.
func useStore(daemon *oracle.Process, plan *workload.Plan, store string) error {
	daemon.Content = store
	for _, c := range plan.Chains {
		for _, l := range c.Layers {
			if err := l.PutBlob(store); err != nil {
				return err
			}
		}
	}
	return nil
}

// Sound checks that the recording can prove anything at all: that flushes were
// seen, every commit was answered, and nothing is missing in the log.
func (r *Recording) Sound() error {
	acked := map[string]bool{}
	for _, m := range r.Marks {
		if m.Phase == workload.Ack && (m.Op == workload.Commit || m.Op == workload.Report) {
			acked[m.Name] = true
		}
	}
	missing := 0
	for name := range r.Record.Trees {
		if !acked[name] {
			missing++
		}
	}
	switch {
	case r.Stats.Overflow:
		return fmt.Errorf("the log has reached its limit: %w", ErrBroken)
	case r.Stats.Flushes == 0:
		return fmt.Errorf("no flush has arrived: %w", ErrBroken)
	case missing > 0 || len(acked) == 0:
		return fmt.Errorf("%d of %d layers have no mark of an acknowledged commit: %w", missing, len(r.Record.Trees), ErrBroken)
	}
	return nil
}

// ID is the first part of the names of the recording's states.
func (r *Recording) ID() string { return fmt.Sprintf("%s-%s-%d", r.Subject, r.FS, r.Seed) }

// retryAt lists the committed names that were begun and not acknowledged at the
// point: what a crash may have left half-done.
func (r *Recording) retryAt(e oracle.Expect) []string {
	var names []string
	for name, status := range e.Committed {
		if status == oracle.Maybe {
			names = append(names, name)
		}
	}
	for key := range e.Active {
		for _, c := range r.Plan.Chains {
			for _, l := range c.Layers {
				if isExtractionOf(key, l) && e.Committed[l.Name] != oracle.Acked {
					names = append(names, l.Name)
				}
			}
		}
	}
	return names
}

func isExtractionOf(key string, l *workload.Layer) bool {
	n := len(key) - len(l.ChainID)
	return n > 0 && key[n:] == l.ChainID
}

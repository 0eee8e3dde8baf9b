package full

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// Check boots a node in states of a recording.
type Check struct {
	Recording *Recording
	Cases     []state.Case
	// Subject recovers and serves the booted node. It is not called when the
	// recording is one of the built-in overlayfs.
	Subject func(worker int) oracle.Process
	Workers int                   // 2 when 0
	Until   func(lab.Result) bool // stops the check when it returns true; may be nil
	Each    func(lab.Result)      // gets every result; may be nil
	// Hold gets every result, while the disk is mounted as the power cut has
	// left it: for an examination by hand. May be nil.
	Hold func(r lab.Result, mountpoint string)

	spoil    func(mountpoint string) error // does damage before the boot, to see it found
	patience time.Duration                 // with directories that are to be deleted; 10 s when 0
	// meddle changes something in containerd when the daemon has dropped what it
	// has to, to see it found.
	meddle func(context.Context, *node) error
}

// Run examines all cases. An error means that the check itself did not work.
func (c *Check) Run(ctx context.Context) (*Tally, error) {
	tally := &Tally{}
	workers := c.Workers
	if workers == 0 {
		workers = 2
	}
	defer tally.Measure()()
	err := lab.SideBySide(ctx, c.Recording.ID(), len(c.Cases), workers, func(ctx context.Context, n int, done *atomic.Bool) error {
		return c.work(ctx, n, workers, tally, done)
	})
	return tally, err
}

// work examines every n-th case on a disk of its own.
func (c *Check) work(ctx context.Context, n, of int, tally *Tally, done *atomic.Bool) (err error) {
	scratch, err := os.MkdirTemp("", "check")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	mountpoint := filepath.Join(scratch, "disk")
	if err := os.Mkdir(mountpoint, 0o700); err != nil {
		return err
	}
	d, err := disk.StartPlain(c.Recording.Base.Size)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	player, err := state.NewPlayer(d, c.Recording.Base, c.Recording.Log)
	if err != nil {
		return err
	}
	for i := n; i < len(c.Cases) && !done.Load(); i += of {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := player.Set(c.Cases[i].State); err != nil {
			return err
		}
		l := c.examination(n, c.Cases[i], d, scratch, mountpoint)
		if err := l.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", l.result.ID, err)
		}
		tally.count(l.result, l.counts, l.notes)
		if c.Each != nil {
			c.Each(l.result)
		}
		if c.Hold != nil {
			if err := errors.Join(player.Set(c.Cases[i].State), d.Mount(c.Recording.FS, mountpoint, c.Recording.Options...)); err != nil {
				return err
			}
			c.Hold(l.result, mountpoint)
			if err := d.Unmount(); err != nil {
				return err
			}
		}
		if c.Until != nil && c.Until(l.result) {
			done.Store(true)
		}
	}
	return nil
}

// examination prepares the examination of one state.
func (c *Check) examination(worker int, k state.Case, d *disk.Plain, scratch, mountpoint string) *examination {
	r := c.Recording
	path := append(slices.Clone(r.before.path), k.State)
	l := &examination{
		Check: c, worker: worker, disk: d, scratch: scratch, mountpoint: mountpoint,
		result: lab.Result{ID: r.ID() + "/" + path.String(), Path: path, Points: len(k.Points)},
	}
	last := -1
	for _, p := range k.Points {
		marks := r.marksBefore(p)
		if len(marks) != last {
			l.promises = append(l.promises, r.before.after(marks))
		}
		last = len(marks)
	}
	l.result.Acked = l.promises[len(l.promises)-1].expect.Promised()
	return l
}

// marksBefore returns the marks among the first entries of the log.
func (r *Recording) marksBefore(point int) []workload.Mark {
	n, _ := slices.BinarySearchFunc(r.Marks, point, func(m workload.Mark, p int) int { return m.Index - p })
	return r.Marks[:n]
}

package full

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// promise is all that was promised when the power went.
type promise struct {
	path   state.Path // of the cut, if there was one
	marks  []workload.Mark
	expect oracle.Expect   // of the daemon
	pulled map[string]bool // images whose pull was answered, and no removal begun
}

// after adds what was promised by further marks.
func (p promise) after(marks []workload.Mark) promise {
	n := promise{path: p.path, marks: slices.Concat(p.marks, marks), expect: p.expect.After(marks, math.MaxInt), pulled: map[string]bool{}}
	maps.Copy(n.pulled, p.pulled)
	for _, m := range marks {
		switch m.Op {
		case opPull:
			if m.Phase == workload.Ack {
				n.pulled[m.Name] = true
			}
		case opDelete:
			delete(n.pulled, m.Name)
		}
	}
	return n
}

// committing reports whether a Commit of an active key was begun.
func (p promise) committing(key string) bool {
	return slices.ContainsFunc(p.marks, func(m workload.Mark) bool { return m.Op == workload.Commit && m.Key == key })
}

// Second boots the node in a state of a recording, has it pull everything again,
// and records that: a recording whose states are those of a second power cut.
func (b *Bench) Second(ctx context.Context, r *Recording, k state.Case, daemon oracle.Process) (_ *Recording, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("record %s/%s again: %w", r.ID(), k.State, err)
		}
	}()
	d, err := disk.Start(r.Base.Size)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	player, err := state.NewPlayer(d, r.Base, r.Log)
	if err != nil {
		return nil, err
	}
	if err := player.Set(k.State); err != nil {
		return nil, err
	}
	before := r.before.after(r.marksBefore(k.Points[len(k.Points)-1]))
	before.path = append(slices.Clone(r.before.path), k.State)
	s := Setup{FS: r.FS, Options: r.Options, Seed: r.Seed, Daemon: daemon, Name: r.Subject}
	if r.Snapshotter == builtIn {
		s.Daemon = oracle.Process{}
	}
	return b.record(ctx, s, d, before, nil)
}

// again is the workload after a crash: garbage is collected, every image is
// pulled, and one of them removed.
func (w *worker) again(ctx context.Context) error {
	if err := w.node.prune(ctx); err != nil {
		return err
	}
	for _, image := range w.bench.images {
		if err := w.pull(ctx, image.Ref); err != nil {
			return err
		}
	}
	return w.remove(ctx, w.bench.images[w.setup.Seed%uint64(len(w.bench.images))].Ref)
}

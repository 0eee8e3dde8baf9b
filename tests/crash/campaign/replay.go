package campaign

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/full"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
)

// Replay makes a state of the campaign in dir again, judges it, and calls hold
// with the place where it is mounted.
func Replay(ctx context.Context, dir, id string, hold func(lab.Result, string) error) (_ lab.Result, err error) {
	s, err := Open(dir)
	if err != nil {
		return lab.Result{}, err
	}
	name, text, ok := strings.Cut(id, "/")
	if !ok {
		return lab.Result{}, fmt.Errorf("replay %q: want the name of a recording, a slash, and a state", id)
	}
	path, err := state.ParsePath(text)
	if err != nil {
		return lab.Result{}, fmt.Errorf("replay %q: %w", id, err)
	}
	r, err := lab.Load(s.RecordingDir(name))
	if err != nil {
		return lab.Result{}, err
	}
	bench, err := lab.NewBench()
	if err != nil {
		return lab.Result{}, err
	}
	defer func() { err = errors.Join(err, bench.Close()) }()
	c := &campaign{Store: s, bench: bench}
	subject := c.subject()
	if r.Subject != subject.name {
		return c.replayFull(ctx, r, path, hold)
	}
	replay := lab.Replay{Recording: r, Path: path, Subject: subject.recovers(0), Strict: subject.strict}
	if len(path) == 2 {
		if replay.Recovery, err = lab.LoadLog(s.secondLog(name, path[0])); err != nil {
			return lab.Result{}, err
		}
	}
	return replay.Run(ctx, hold)
}

// replayFull boots the node again. The disk is held after that, with its
// processes stopped: there is no other moment at which all of it can be seen.
func (c *campaign) replayFull(ctx context.Context, kept *lab.Recording, path state.Path, hold func(lab.Result, string) error) (result lab.Result, err error) {
	if len(path) != 1 {
		return result, fmt.Errorf("replay %s: one cut only with the workload %s", path, Full)
	}
	b, err := full.NewBench(ctx, c.bench)
	if err != nil {
		return result, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	r := b.Adopt(kept)
	one, err := state.CaseOf(r.Log, path[0], r.Start)
	if err != nil {
		return result, err
	}
	var held error
	check := full.Check{
		Recording: r, Cases: []state.Case{one}, Workers: 1,
		Subject: func(n int) oracle.Process { return c.ours(fmt.Sprintf("boot-%d", n)) },
		Hold:    func(r lab.Result, mountpoint string) { held = hold(r, mountpoint) },
		Each:    func(r lab.Result) { result = r },
	}
	_, err = check.Run(ctx)
	return result, errors.Join(err, held)
}

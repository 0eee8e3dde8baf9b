package full

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
)

// look is the look at one state: the disk is set, the power comes back.
type look struct {
	*Check
	worker              int
	disk                *disk.Plain
	scratch, mountpoint string
	promises            []promise // at the points of the case

	daemon   *oracle.Running
	node     *node
	seen     oracle.Observation
	findings []oracle.Finding  // that hold at every point
	equal    map[string]bool   // images that are what they should be
	unready  map[string]string // images that are listed and not unpacked, and why

	result lab.Result
	counts Counts
	notes  []string // what is containerd's own
}

func (l *look) find(kind oracle.Kind, name, format string, args ...any) {
	l.findings = append(l.findings, oracle.Finding{Kind: kind, Name: name, Detail: fmt.Sprintf(format, args...)})
}

func (l *look) note(format string, args ...any) {
	l.notes = append(l.notes, fmt.Sprintf(format, args...))
}

// run boots the node, asks it, and judges. An error is one of the harness.
func (l *look) run(ctx context.Context) error {
	began := time.Now()
	r := l.Recording
	if err := l.disk.Mount(r.FS, l.mountpoint, r.Options...); err != nil {
		l.result.Verdict, l.result.Reason = lab.NotMeasured, err.Error()
		return nil
	}
	l.equal, l.unready = map[string]bool{}, map[string]string{}
	var err error
	if l.spoil != nil {
		err = l.spoil(l.mountpoint)
	}
	if err == nil {
		err = l.boot(ctx)
	}
	if err = errors.Join(err, l.disk.Unmount()); err != nil {
		return err
	}
	l.judge()
	l.result.Took = time.Since(began)
	return nil
}

// boot starts what is on the disk, as a machine would, and asks.
func (l *look) boot(ctx context.Context) (err error) {
	var beliefs func() ([]belief, error)
	address := ""
	if l.Recording.Snapshotter == proxied {
		subject := l.Subject(l.worker)
		address = subject.Address
		if l.recover(ctx, subject); l.daemon == nil {
			return nil // without it there is nothing to ask, and that is said
		}
		defer func() { err = errors.Join(err, l.daemon.Kill()) }()
		if beliefs, err = l.copyBeliefs(); err != nil {
			return err
		}
	}
	if l.node, err = l.Recording.bench.boot(ctx, l.Recording.Snapshotter, filepath.Join(l.mountpoint, containerdDir), address); err != nil {
		l.unmeasured("containerd does not start: " + brief(err))
		return nil
	}
	defer func() { err = errors.Join(err, l.node.stop()) }()
	err = l.ask(namespaces.WithNamespace(ctx, namespace), beliefs)
	if errors.Is(err, errUnmeasured) {
		return nil
	}
	if !l.node.containerd.Running() {
		l.unmeasured("containerd has ended by itself: " + l.node.containerd.LogTail(500))
		return nil
	}
	l.counts.Booted++
	return err
}

// ask asks containerd all there is to ask.
func (l *look) ask(ctx context.Context, beliefs func() ([]belief, error)) error {
	if err := l.images(ctx); err != nil {
		return err
	}
	if l.Recording.Snapshotter == builtIn {
		return nil // the control: what it says is all that is asked of it
	}
	if err := l.agree(beliefs); err != nil {
		return err
	}
	l.again(ctx)
	l.sweep(ctx)
	return nil
}

// unmeasured says that containerd could not be asked. What it did not answer
// is not held against the snapshotter, what it showed is.
func (l *look) unmeasured(reason string) {
	l.counts.NotBooted++
	l.result.Verdict, l.result.Reason = lab.NotMeasured, reason
	l.note("%s", reason)
	l.findings = slices.DeleteFunc(l.findings, func(f oracle.Finding) bool { return f.Kind == oracle.Flaw })
}

// recover starts the daemon and has the oracle look at its layers.
func (l *look) recover(ctx context.Context, subject oracle.Process) {
	s := &keep{Process: subject}
	looker := oracle.Looker{Subject: s, Plan: l.Recording.Plan, Record: l.Recording.Record, Scratch: l.scratch}
	l.seen = looker.Look(ctx, filepath.Join(l.mountpoint, snapshotterDir), oracle.Extent{})
	l.daemon = s.running
}

// keep is a process that stays when the oracle has seen enough: containerd
// is to find the daemon that has recovered.
type keep struct {
	oracle.Process
	running *oracle.Running
}

// Start starts the process.
func (k *keep) Start(ctx context.Context, root string) (_ snapshots.Snapshotter, err error) {
	if k.running, err = k.Process.Launch(ctx, root); err != nil {
		k.running = nil
		return nil, err
	}
	return open{k.running}, nil
}

// open is a snapshotter whose Close does nothing.
type open struct{ *oracle.Running }

func (open) Close() error { return nil }

// judge weighs what was found, at each point where the power may have gone.
func (l *look) judge() {
	verdict := l.result.Verdict
	for _, p := range l.promises {
		var findings []oracle.Finding
		if l.Recording.Snapshotter == proxied {
			findings = oracle.Judge(&l.seen, p.expect, l.Recording.Plan)
			findings = append(findings, l.parents()...)
		}
		for _, f := range l.findings {
			findings = append(findings, f)
			if f.Kind == oracle.Lie && p.pulled[f.Name] {
				findings = append(findings, oracle.Finding{Kind: oracle.Lost, Name: f.Name, Detail: "its pull was answered"})
			}
		}
		for ref, reason := range l.unready {
			if p.pulled[ref] {
				findings = append(findings, oracle.Finding{Kind: oracle.Lost, Name: ref, Detail: "its pull was answered, and it is not unpacked: " + reason})
			}
		}
		l.result.Weigh(findings)
	}
	if l.result.Verdict != verdict {
		l.result.Reason = ""
	}
}

// parents checks that each layer stands on the layer below it.
func (l *look) parents() []oracle.Finding {
	var out []oracle.Finding
	for name, seen := range l.seen.Committed {
		own, ok := l.Recording.bench.layers[chainID(name)]
		if !ok {
			continue
		}
		if got := chainID(seen.Parent); got != own.parent {
			out = append(out, oracle.Finding{Kind: oracle.Lie, Name: name, Detail: fmt.Sprintf("its parent is %q, reported is %q", own.parent, got)})
		}
	}
	return out
}

// brief is the first line of an error.
func brief(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

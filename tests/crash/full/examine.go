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
	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
)

// examination is that of one state: the disk is set, the power comes back.
type examination struct {
	*Check
	worker              int
	disk                *disk.Plain
	scratch, mountpoint string
	promises            []promise // at the points of the case

	daemon    *oracle.Running
	node      *node
	good      map[digest.Digest]bool // blobs, before the boot; of a recording with damage only
	inventory inventory              // what containerd has, likewise
	seen      oracle.Observation
	findings  []oracle.Finding  // that hold at every point
	equal     map[string]bool   // images that are what they should be
	unready   map[string]string // images that are listed and not unpacked, and why

	result lab.Result
	counts Counts
	notes  []string // what is containerd's own
}

func (l *examination) find(kind oracle.Kind, name, format string, args ...any) {
	l.findings = append(l.findings, oracle.Finding{Kind: kind, Name: name, Detail: fmt.Sprintf(format, args...)})
}

func (l *examination) note(format string, args ...any) {
	l.notes = append(l.notes, fmt.Sprintf(format, args...))
}

// run boots the node, queries it, and judges. An error is one of the harness.
func (l *examination) run(ctx context.Context) error {
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

// boot starts what is on the disk, as a machine would, and queries it.
func (l *examination) boot(ctx context.Context) (err error) {
	meta, address := "", ""
	run := filepath.Join(l.scratch, "run")
	if l.Recording.Snapshotter == proxied {
		subject := l.Subject(l.worker)
		address = subject.Address
		if l.Recording.damaged() {
			subject = serving(subject, run, l.Recording.Damage)
			if l.good, err = l.Recording.bench.goodBlobs(l.mountpoint); err != nil {
				return err
			}
		}
		if l.recover(ctx, subject); l.daemon == nil {
			return nil // without it there is nothing to query, and that is reported
		}
		defer func() { err = errors.Join(err, l.daemon.Kill()) }()
		if meta, err = l.copyMeta(); err != nil {
			return err
		}
	}
	if l.node, err = l.Recording.bench.boot(ctx, l.Recording.Snapshotter, filepath.Join(l.mountpoint, containerdDir), address, run, l.Recording.Subject == ByCRI); err != nil {
		l.unmeasured("containerd does not start: " + brief(err))
		return nil
	}
	defer func() { err = errors.Join(err, l.node.stop()) }()
	err = l.query(namespaces.WithNamespace(ctx, namespace), meta)
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

// query verifies through containerd all there is to verify. meta is a copy of its database from
// before its boot.
func (l *examination) query(ctx context.Context, meta string) error {
	// A containerd that cannot open its database starts without most of its
	// services.
	if _, err := l.node.client.ImageService().List(ctx); err != nil {
		l.unmeasured("containerd does not list its images: " + brief(err))
		return errUnmeasured
	}
	if l.Recording.Snapshotter == builtIn {
		return l.images(ctx) // the control: what it lists is all that is verified of it
	}
	m, err := readMetadata(meta)
	if err != nil {
		return err
	}
	if l.Recording.damaged() {
		if err := l.drops(ctx, m); err != nil {
			return err
		}
	}
	if err := l.images(ctx); err != nil {
		return err
	}
	if l.node.cri != nil {
		if err := l.runs(ctx); err != nil {
			return err
		}
	}
	l.agree(m)
	if l.Recording.damaged() {
		if err := l.stays(ctx); err != nil {
			return err
		}
	}
	if l.Recording.Damage == Astray {
		return nil // what is damaged is in the way of a pull
	}
	l.again(ctx)
	l.sweep(ctx)
	return nil
}

// unmeasured records that containerd could not be queried. What it did not answer
// is not held against the snapshotter, what it showed is.
func (l *examination) unmeasured(reason string) {
	l.counts.NotBooted++
	l.result.Verdict, l.result.Reason = lab.NotMeasured, reason
	l.note("%s", reason)
	l.findings = slices.DeleteFunc(l.findings, func(f oracle.Finding) bool { return f.Kind == oracle.Flaw })
}

// recover starts the daemon and has the oracle examine its layers.
func (l *examination) recover(ctx context.Context, subject oracle.Process) {
	s := &keep{Process: subject}
	examiner := oracle.Examiner{Subject: s, Plan: l.Recording.Plan, Record: l.Recording.Record, Healable: l.healable(), Scratch: l.scratch}
	l.seen = examiner.Examine(ctx, filepath.Join(l.mountpoint, snapshotterDir), oracle.Extent{})
	l.daemon = s.running
}

// healable returns the layers that had no good blob when the log began, and have one in
// this state. containerd deletes the row of a dropped layer before it calls Remove; a
// pull that begins between the two brings the blob of a layer that is still there.
func (l *examination) healable() (names []string) {
	if l.Recording.Damage != Damaged {
		return nil // the daemon does not have the content store in which good blobs are
	}
	blobs := l.Recording.bench.blobs()
	for _, name := range l.Recording.Record.Hopeless {
		if l.good[blobs[chainID(name)]] {
			names = append(names, name)
		}
	}
	return names
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
func (l *examination) judge() {
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
func (l *examination) parents() []oracle.Finding {
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

package full

import (
	"context"
	"errors"
	"sync"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// between stands between containerd and a snapshotter. It passes each call and
// each answer on as it is, and marks in the log of the disk when a call that
// changes something was begun and how it ended. The mark of the end is appended
// before containerd gets the answer.
type between struct {
	forwarder *kit.Forwarder
	marks     workload.Marker

	mu  sync.Mutex // guards err
	err error      // the first of marking
}

// listenBetween serves at address what the snapshotter at target answers.
func listenBetween(address, target string, marks workload.Marker) (_ *between, err error) {
	b := &between{marks: marks}
	b.forwarder, err = kit.StartForwarder(address, target, b.marked)
	return b, err
}

// Close stops it and reports whether a mark is missing.
func (b *between) Close() error {
	err := b.forwarder.Close()
	b.mu.Lock()
	defer b.mu.Unlock()
	return errors.Join(b.err, err)
}

func (b *between) mark(phase workload.Phase, op workload.Op, name, key string) error {
	_, err := b.marks.Mark(workload.Mark{Phase: phase, Op: op, Name: name, Key: key}.Text())
	if err != nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.err = errors.Join(b.err, err)
	}
	return err
}

// marked passes a call on, between its two marks if it changes something.
func (b *between) marked(ctx context.Context, request any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	var op workload.Op
	var name, key string
	switch r := request.(type) {
	case *snapshotsapi.PrepareSnapshotRequest:
		op, name = workload.Prepare, r.Key
	case *snapshotsapi.ViewSnapshotRequest:
		op, name = workload.Prepare, r.Key
	case *snapshotsapi.CommitSnapshotRequest:
		op, name, key = workload.Commit, r.Name, r.Key
	case *snapshotsapi.RemoveSnapshotRequest:
		op, name = workload.Remove, r.Key
	default:
		return next(ctx, request)
	}
	if err := b.mark(workload.Begin, op, name, key); err != nil {
		return nil, err
	}
	answer, err := next(ctx, request)
	phase := workload.Ack
	if err != nil {
		phase = workload.Fail
	}
	if missing := b.mark(phase, op, name, key); missing != nil {
		return answer, missing
	}
	return answer, err
}

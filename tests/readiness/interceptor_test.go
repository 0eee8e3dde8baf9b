package readiness

import (
	"context"
	"strings"
	"sync"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// interceptor stands between containerd and the daemon. It passes each call and each
// answer on as it is, except that Stat, Prepare and View report of chosen committed
// snapshots that they are not whole, with an error of a chosen kind. A test can also do
// something before it passes calls on, and after a Commit was answered by the daemon.
type interceptor struct {
	address string

	mu        sync.Mutex // guards what follows
	code      codes.Code
	bad       map[string]bool // backend names
	before    func(request any)
	committed func(ctx context.Context, name string)
}

// call makes it call before with each request, and committed with the backend name of
// each snapshot that the daemon has committed, while containerd waits for the answer.
// Either may be nil.
func (s *interceptor) call(before func(request any), committed func(ctx context.Context, name string)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before, s.committed = before, committed
}

func (s *interceptor) calls() (before func(any), committed func(context.Context, string)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.before, s.committed
}

// listen serves at a socket of its own what the snapshotter at target answers.
func listen(t testing.TB, target string) *interceptor {
	t.Helper()
	s := &interceptor{address: scratch(t) + "/between.sock"}
	f := must[*kit.Forwarder](t)(kit.StartForwarder(s.address, target, s.intercept))
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// answerWith makes it answer with code for the named snapshots; with none, it passes
// everything on again.
func (s *interceptor) answerWith(code codes.Code, names ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.code, s.bad = code, map[string]bool{}
	for _, n := range names {
		s.bad[n] = true
	}
}

func (s *interceptor) answer(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.bad[name] {
		return nil
	}
	return status.Errorf(s.code, "layer %s is not whole", name[strings.LastIndex(name, "/")+1:])
}

func (s *interceptor) intercept(ctx context.Context, request any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	before, committed := s.calls()
	if before != nil {
		before(request)
	}
	var err error
	switch r := request.(type) {
	case *snapshotsapi.PrepareSnapshotRequest:
		err = s.answer(r.Parent)
	case *snapshotsapi.ViewSnapshotRequest:
		err = s.answer(r.Parent)
	case *snapshotsapi.StatSnapshotRequest:
		err = s.answer(r.Key)
	}
	if err != nil {
		return nil, err
	}
	answer, err := next(ctx, request)
	if r, ok := request.(*snapshotsapi.CommitSnapshotRequest); ok && err == nil && committed != nil {
		committed(ctx, r.Name)
	}
	return answer, err
}

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

// sayer stands between containerd and the daemon. It passes each call and each
// answer on as it is, except that Stat, Prepare and View say of chosen committed
// snapshots that they are not whole, with an error of a chosen kind.
type sayer struct {
	address string

	mu   sync.Mutex // guards code and bad
	code codes.Code
	bad  map[string]bool // backend names
}

// listen serves at a socket of its own what the snapshotter at target answers.
func listen(t testing.TB, target string) *sayer {
	t.Helper()
	s := &sayer{address: scratch(t) + "/between.sock"}
	f := must[*kit.Forwarder](t)(kit.StartForwarder(s.address, target, s.intercept))
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// say makes it answer with code for the named snapshots; with none, it passes
// everything on again.
func (s *sayer) say(code codes.Code, names ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.code, s.bad = code, map[string]bool{}
	for _, n := range names {
		s.bad[n] = true
	}
}

func (s *sayer) answer(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.bad[name] {
		return nil
	}
	return status.Errorf(s.code, "layer %s is not whole", name[strings.LastIndex(name, "/")+1:])
}

func (s *sayer) intercept(ctx context.Context, request any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
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
	return next(ctx, request)
}

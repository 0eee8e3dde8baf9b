package readiness

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// sayer stands between containerd and the daemon. It passes each call and each
// answer on as it is, except that Stat, Prepare and View say of chosen committed
// snapshots that they are not whole, with an error of a chosen kind.
type sayer struct {
	snapshotsapi.UnimplementedSnapshotsServer
	next    snapshotsapi.SnapshotsClient
	address string

	mu   sync.Mutex // guards code and bad
	code codes.Code
	bad  map[string]bool // backend names
}

// listen serves at a socket of its own what the snapshotter at target answers.
func listen(t testing.TB, target string) *sayer {
	t.Helper()
	conn := must[*grpc.ClientConn](t)(grpc.NewClient("unix://"+target, grpc.WithTransportCredentials(insecure.NewCredentials())))
	s := &sayer{next: snapshotsapi.NewSnapshotsClient(conn), address: scratch(t) + "/between.sock"}
	l := must[net.Listener](t)(net.Listen("unix", s.address))
	server, served := grpc.NewServer(), make(chan error, 1)
	snapshotsapi.RegisterSnapshotsServer(server, s)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
		if err := conn.Close(); err != nil {
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

// onward is the context of a call to the daemon. gRPC hands metadata that arrived
// to nobody by itself; containerd's are the namespace and the lease.
func onward(ctx context.Context) context.Context {
	md, _ := metadata.FromIncomingContext(ctx)
	out := metadata.MD{}
	for k, v := range md {
		if strings.HasPrefix(k, "containerd-") {
			out[k] = v
		}
	}
	return metadata.NewOutgoingContext(ctx, out)
}

func (s *sayer) Prepare(ctx context.Context, r *snapshotsapi.PrepareSnapshotRequest) (*snapshotsapi.PrepareSnapshotResponse, error) {
	if err := s.answer(r.Parent); err != nil {
		return nil, err
	}
	return s.next.Prepare(onward(ctx), r)
}

func (s *sayer) View(ctx context.Context, r *snapshotsapi.ViewSnapshotRequest) (*snapshotsapi.ViewSnapshotResponse, error) {
	if err := s.answer(r.Parent); err != nil {
		return nil, err
	}
	return s.next.View(onward(ctx), r)
}

func (s *sayer) Stat(ctx context.Context, r *snapshotsapi.StatSnapshotRequest) (*snapshotsapi.StatSnapshotResponse, error) {
	if err := s.answer(r.Key); err != nil {
		return nil, err
	}
	return s.next.Stat(onward(ctx), r)
}

func (s *sayer) Commit(ctx context.Context, r *snapshotsapi.CommitSnapshotRequest) (*emptypb.Empty, error) {
	return s.next.Commit(onward(ctx), r)
}

func (s *sayer) Remove(ctx context.Context, r *snapshotsapi.RemoveSnapshotRequest) (*emptypb.Empty, error) {
	return s.next.Remove(onward(ctx), r)
}

func (s *sayer) Mounts(ctx context.Context, r *snapshotsapi.MountsRequest) (*snapshotsapi.MountsResponse, error) {
	return s.next.Mounts(onward(ctx), r)
}

func (s *sayer) Update(ctx context.Context, r *snapshotsapi.UpdateSnapshotRequest) (*snapshotsapi.UpdateSnapshotResponse, error) {
	return s.next.Update(onward(ctx), r)
}

func (s *sayer) Usage(ctx context.Context, r *snapshotsapi.UsageRequest) (*snapshotsapi.UsageResponse, error) {
	return s.next.Usage(onward(ctx), r)
}

func (s *sayer) Cleanup(ctx context.Context, r *snapshotsapi.CleanupRequest) (*emptypb.Empty, error) {
	return s.next.Cleanup(onward(ctx), r)
}

func (s *sayer) List(r *snapshotsapi.ListSnapshotsRequest, out snapshotsapi.Snapshots_ListServer) error {
	in, err := s.next.List(onward(out.Context()), r)
	if err != nil {
		return err
	}
	for {
		part, err := in.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := out.Send(part); err != nil {
			return err
		}
	}
}

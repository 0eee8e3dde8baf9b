package full

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// between stands between containerd and a snapshotter. It passes each call and
// each answer on as it is, and marks in the log of the disk when a call that
// changes something was begun and how it ended. The mark of the end is appended
// before containerd hears of it.
type between struct {
	snapshotsapi.UnimplementedSnapshotsServer
	next   snapshotsapi.SnapshotsClient
	marks  workload.Marker
	conn   *grpc.ClientConn
	server *grpc.Server
	served chan error

	mu  sync.Mutex // guards err
	err error      // the first of marking
}

// listenBetween serves at address what the snapshotter at target answers.
func listenBetween(address, target string, marks workload.Marker) (*between, error) {
	conn, err := grpc.NewClient("unix://"+target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", address)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	b := &between{
		next: snapshotsapi.NewSnapshotsClient(conn), marks: marks,
		conn: conn, server: grpc.NewServer(), served: make(chan error, 1),
	}
	snapshotsapi.RegisterSnapshotsServer(b.server, b)
	go func() { b.served <- b.server.Serve(l) }()
	return b, nil
}

// Close stops it and tells whether a mark is missing.
func (b *between) Close() error {
	b.server.Stop()
	err := <-b.served
	if errors.Is(err, grpc.ErrServerStopped) {
		err = nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return errors.Join(b.err, err, b.conn.Close())
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

// marked makes a call between its two marks.
func marked[R any](b *between, op workload.Op, name, key string, call func() (R, error)) (R, error) {
	if err := b.mark(workload.Begin, op, name, key); err != nil {
		var none R
		return none, err
	}
	answer, err := call()
	phase := workload.Ack
	if err != nil {
		phase = workload.Fail
	}
	if missing := b.mark(phase, op, name, key); missing != nil {
		return answer, missing
	}
	return answer, err
}

// onward is the context of a call to the next server. gRPC hands metadata that
// arrived to nobody by itself; containerd's are the namespace and the lease.
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

func (b *between) Prepare(ctx context.Context, r *snapshotsapi.PrepareSnapshotRequest) (*snapshotsapi.PrepareSnapshotResponse, error) {
	return marked(b, workload.Prepare, r.Key, "", func() (*snapshotsapi.PrepareSnapshotResponse, error) {
		return b.next.Prepare(onward(ctx), r)
	})
}

func (b *between) View(ctx context.Context, r *snapshotsapi.ViewSnapshotRequest) (*snapshotsapi.ViewSnapshotResponse, error) {
	return marked(b, workload.Prepare, r.Key, "", func() (*snapshotsapi.ViewSnapshotResponse, error) {
		return b.next.View(onward(ctx), r)
	})
}

func (b *between) Commit(ctx context.Context, r *snapshotsapi.CommitSnapshotRequest) (*emptypb.Empty, error) {
	return marked(b, workload.Commit, r.Name, r.Key, func() (*emptypb.Empty, error) {
		return b.next.Commit(onward(ctx), r)
	})
}

func (b *between) Remove(ctx context.Context, r *snapshotsapi.RemoveSnapshotRequest) (*emptypb.Empty, error) {
	return marked(b, workload.Remove, r.Key, "", func() (*emptypb.Empty, error) {
		return b.next.Remove(onward(ctx), r)
	})
}

func (b *between) Mounts(ctx context.Context, r *snapshotsapi.MountsRequest) (*snapshotsapi.MountsResponse, error) {
	return b.next.Mounts(onward(ctx), r)
}

func (b *between) Stat(ctx context.Context, r *snapshotsapi.StatSnapshotRequest) (*snapshotsapi.StatSnapshotResponse, error) {
	return b.next.Stat(onward(ctx), r)
}

func (b *between) Update(ctx context.Context, r *snapshotsapi.UpdateSnapshotRequest) (*snapshotsapi.UpdateSnapshotResponse, error) {
	return b.next.Update(onward(ctx), r)
}

func (b *between) Usage(ctx context.Context, r *snapshotsapi.UsageRequest) (*snapshotsapi.UsageResponse, error) {
	return b.next.Usage(onward(ctx), r)
}

func (b *between) Cleanup(ctx context.Context, r *snapshotsapi.CleanupRequest) (*emptypb.Empty, error) {
	return b.next.Cleanup(onward(ctx), r)
}

func (b *between) List(r *snapshotsapi.ListSnapshotsRequest, out snapshotsapi.Snapshots_ListServer) error {
	in, err := b.next.List(onward(out.Context()), r)
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

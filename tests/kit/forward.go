package kit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Forwarder stands between containerd and a snapshotter. It passes each call and
// each answer on as it is.
type Forwarder struct {
	snapshotsapi.UnimplementedSnapshotsServer
	next   snapshotsapi.SnapshotsClient
	conn   *grpc.ClientConn
	server *grpc.Server
	served chan error
}

// StartForwarder serves at the socket address what the snapshotter at the socket
// target answers. Each call but List, which is a stream, goes through each: it
// sees the request, and passes it on, or answers instead.
func StartForwarder(address, target string, each grpc.UnaryServerInterceptor) (*Forwarder, error) {
	conn, err := dial(target)
	if err != nil {
		return nil, fmt.Errorf("forwarder: %w", err)
	}
	l, err := net.Listen("unix", address)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("forwarder: %w", err), conn.Close())
	}
	f := &Forwarder{
		next: snapshotsapi.NewSnapshotsClient(conn), conn: conn,
		server: grpc.NewServer(grpc.UnaryInterceptor(each)), served: make(chan error, 1),
	}
	snapshotsapi.RegisterSnapshotsServer(f.server, f)
	go func() { f.served <- f.server.Serve(l) }()
	return f, nil
}

// Close ends the calls that are under way, and waits for the last of them.
func (f *Forwarder) Close() error {
	f.server.Stop()
	err := <-f.served
	if errors.Is(err, grpc.ErrServerStopped) {
		err = nil
	}
	return errors.Join(err, f.conn.Close())
}

// onward is the context of a call to the snapshotter. gRPC does not
// forward the metadata of a request by itself; containerd's are the namespace and the lease.
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

func (f *Forwarder) Prepare(ctx context.Context, r *snapshotsapi.PrepareSnapshotRequest) (*snapshotsapi.PrepareSnapshotResponse, error) {
	return f.next.Prepare(onward(ctx), r)
}

func (f *Forwarder) View(ctx context.Context, r *snapshotsapi.ViewSnapshotRequest) (*snapshotsapi.ViewSnapshotResponse, error) {
	return f.next.View(onward(ctx), r)
}

func (f *Forwarder) Mounts(ctx context.Context, r *snapshotsapi.MountsRequest) (*snapshotsapi.MountsResponse, error) {
	return f.next.Mounts(onward(ctx), r)
}

func (f *Forwarder) Commit(ctx context.Context, r *snapshotsapi.CommitSnapshotRequest) (*emptypb.Empty, error) {
	return f.next.Commit(onward(ctx), r)
}

func (f *Forwarder) Remove(ctx context.Context, r *snapshotsapi.RemoveSnapshotRequest) (*emptypb.Empty, error) {
	return f.next.Remove(onward(ctx), r)
}

func (f *Forwarder) Stat(ctx context.Context, r *snapshotsapi.StatSnapshotRequest) (*snapshotsapi.StatSnapshotResponse, error) {
	return f.next.Stat(onward(ctx), r)
}

func (f *Forwarder) Update(ctx context.Context, r *snapshotsapi.UpdateSnapshotRequest) (*snapshotsapi.UpdateSnapshotResponse, error) {
	return f.next.Update(onward(ctx), r)
}

func (f *Forwarder) Usage(ctx context.Context, r *snapshotsapi.UsageRequest) (*snapshotsapi.UsageResponse, error) {
	return f.next.Usage(onward(ctx), r)
}

func (f *Forwarder) Cleanup(ctx context.Context, r *snapshotsapi.CleanupRequest) (*emptypb.Empty, error) {
	return f.next.Cleanup(onward(ctx), r)
}

func (f *Forwarder) List(r *snapshotsapi.ListSnapshotsRequest, out snapshotsapi.Snapshots_ListServer) error {
	in, err := f.next.List(onward(out.Context()), r)
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

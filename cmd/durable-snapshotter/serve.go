package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/coreos/go-systemd/v22/daemon"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

// serve runs the daemon until its context ends, then finishes what is in
// flight.
func serve(c *command) (err error) {
	if err := c.parseOnly(); err != nil {
		return err
	}
	cfg, err := c.config()
	if err != nil {
		return err
	}
	if err := setUpLog(cfg.LogLevel); err != nil {
		return err
	}
	// Before recovery touches the root: a live daemon means a mistake.
	for _, socket := range []string{cfg.Address, adminSocket(cfg.Address)} {
		if err := checkSocket(socket); err != nil {
			return err
		}
	}

	healthy := health.NewServer()
	sc := cfg.snapshotter()
	sc.OnHealth = func(err error) { setHealth(healthy, err) }
	news := newMessenger(cfg)
	sc.OnDamaged, sc.OnReady = news.lost, news.ready
	sn, err := snapshotter.New(c.ctx, sc)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sn.Close(), news.close()) }()
	news.run(c.ctx, sn)

	admin, err := serveAdmin(c.ctx, cfg, sn)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, admin.Close()) }()
	l, err := listen(c.ctx, cfg.Address)
	if err != nil {
		return err
	}
	return serveGRPC(c.ctx, l, sn, healthy)
}

func serveGRPC(ctx context.Context, l net.Listener, sn *snapshotter.Snapshotter, healthy *health.Server) error {
	server := grpc.NewServer(
		grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize),
		grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize),
		grpc.UnaryInterceptor(unary), grpc.StreamInterceptor(stream(ctx)),
	)
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))
	healthapi.RegisterHealthServer(server, healthy)

	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	log.G(ctx).WithField("address", l.Addr().String()).WithField("version", version).Info("serving")
	// Outside systemd this does nothing.
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		log.G(ctx).WithError(err).Warn("systemd was not told that the daemon is ready")
	}

	select {
	case err := <-served:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	log.G(ctx).Info("stopping: finishing what is in flight")
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
	healthy.Shutdown()
	server.GracefulStop()
	return <-served
}

// setHealth tells health checks whether the file system takes writes.
func setHealth(h *health.Server, err error) {
	s := healthapi.HealthCheckResponse_SERVING
	if err != nil {
		s = healthapi.HealthCheckResponse_NOT_SERVING
	}
	h.SetServingStatus("", s)
}

// unary logs errors at debug level and keeps a panic from ending the daemon.
func unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (_ any, err error) {
	defer func() { err = finish(ctx, info.FullMethod, recover(), err) }()
	return handler(ctx, req)
}

// stream does the same, and translates: containerd's snapshotservice returns
// the errors of a List as they are (contrib/snapshotservice/service.go:146). A
// health check that watches ends with the daemon; it would never end by itself,
// and a graceful stop would wait for it.
func stream(daemon context.Context) grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
		defer func() { err = finish(ss.Context(), info.FullMethod, recover(), err) }()
		if info.FullMethod == healthapi.Health_Watch_FullMethodName {
			ctx, cancel := context.WithCancel(ss.Context())
			defer cancel()
			defer context.AfterFunc(daemon, cancel)()
			ss = boundStream{ss, ctx}
		}
		err = handler(srv, ss)
		if _, ok := status.FromError(err); !ok {
			err = errgrpc.ToGRPC(err)
		}
		return err
	}
}

// boundStream is a stream with a context of its own.
type boundStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s boundStream) Context() context.Context { return s.ctx }

func finish(ctx context.Context, method string, panicked any, err error) error {
	if panicked != nil {
		log.G(ctx).WithField("method", method).Errorf("panic: %v\n%s", panicked, debug.Stack())
		return status.Errorf(codes.Internal, "durable-snapshotter: %v; see its log", panicked)
	}
	if err != nil {
		log.G(ctx).WithField("method", method).WithError(err).Debug("answered with an error")
	}
	return err
}

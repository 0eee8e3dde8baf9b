package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/diffservice"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/differ"
	"github.com/durable-snapshotter/durable-snapshotter/internal/imagecheck"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/metrics"
	"github.com/durable-snapshotter/durable-snapshotter/internal/notify"
	"github.com/durable-snapshotter/durable-snapshotter/internal/refill"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
	"github.com/durable-snapshotter/durable-snapshotter/internal/sockets"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// The limits of a stop, from the signal on. systemd gives a service 90 s, and a
// power cut or a reboot less; what is killed verifies all layers at the next boot.
const (
	finishWithin = 3500 * time.Millisecond // calls in flight
	greetWithin  = 300 * time.Millisecond  // connections that have just been accepted
	cancelWithin = 300 * time.Millisecond  // those that were canceled then
	stopWithin   = 4800 * time.Millisecond // everything
)

// maxCalls is how many calls of one connection are in flight at once. containerd has one
// connection, and a node some hundred containers.
const maxCalls = 1024

// errCut is returned when the daemon ends with work in flight, which only the
// kernel can hold so long: a syncfs on a slow disk.
var errCut = errors.New("stopped with work in flight; what was not acknowledged is put right at the next start")

// serve runs the daemon until its context ends, then finishes what is in
// flight, for as long as stopWithin allows.
func serve(c *command) error {
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
	// containerd's snapshotter leaves the mode of a container's root directory to it.
	// Service managers that harden set another, and users could not enter.
	unix.Umask(0o022)
	served := make(chan error, 1)
	go func() { served <- serveConfig(c.ctx, cfg) }()
	select {
	case err := <-served:
		return err
	case <-c.ctx.Done():
	}
	select {
	case err := <-served:
		return err
	case <-time.After(stopWithin):
		return errCut
	}
}

func serveConfig(ctx context.Context, cfg Config) (err error) {
	given, err := sockets.Inherited()
	if err != nil {
		return err
	}
	// Before recovery touches the root: a live daemon means a mistake.
	paths := []string{cfg.Address, sockets.Admin(cfg.Address)}
	if err := given.Check(paths...); err != nil {
		return err
	}
	if left := given.Unused(paths...); len(left) > 0 {
		return fmt.Errorf("the service manager has passed the sockets %q, and the configuration has %q: make them equal", left, paths)
	}

	healthy := health.NewServer()
	sc := cfg.snapshotter()
	metrics.Writable.Set(1)
	metrics.Build.WithLabelValues(version, revision, runtime.Version()).Set(1)
	sc.OnHealth = func(err error) {
		metrics.Set(metrics.Writable, err == nil)
		setHealth(healthy, "", err == nil)
	}
	setHealth(healthy, mendingService, true)
	sc.OnBrake = func(reason string) { setHealth(healthy, mendingService, reason == "") }
	notifier := notify.New(cfg.notifier())
	sc.OnDamaged = func(e *layers.DamagedError) {
		if e.NoBlob {
			notifier.NotifyDamaged(e.Name, e.Namespace, e.ChainID)
		}
	}
	sc.OnReady = func(e storage.CommitEntry) { notifier.NotifyReady(e.Namespace, e.ChainID) }
	sc.OnOutside = func(e storage.CommitEntry, b blobs.Blob) {
		notifier.NotifyOutside(e.Namespace, e.ChainID, refill.Bytes{Digest: b.Digest, Size: b.Size, Open: b.Raw})
	}
	sc.OnCommit = notifier.NotifyCommitted
	sn, err := snapshotter.New(ctx, sc)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sn.Close(), notifier.Close()) }()
	ctx, stop := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer func() { stop(); background.Wait() }()
	// At once, whatever is in flight: calls that wait for a layer are answered.
	defer context.AfterFunc(ctx, sn.Stopping)()
	notifier.Run(ctx, struct {
		*layers.Layers
		repull.Rows
	}{sn.Layers(), sn})

	background.Go(func() { imagecheck.Run(ctx, cfg.imageCheck(), sn) })

	admin, err := serveAdmin(ctx, cfg, sn, given)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, admin.Close()) }()
	l, err := given.Listen(ctx, cfg.Address)
	if err != nil {
		return err
	}
	admin.Serving()
	d, closeDiffer, err := cfg.differ(sn)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeDiffer()) }()
	return serveGRPC(ctx, l, sn, d, healthy)
}

// differ returns the diff service for containerd. What it calls of containerd is never
// called from inside a call of the snapshotter, where containerd holds locks.
func (c Config) differ(sn *snapshotter.Snapshotter) (d *differ.Differ, close func() error, err error) {
	dc := differ.Config{Snapshots: sn, ContentRoot: c.ContentRoot, Own: c.Diff.Enabled, Igzip: c.Diff.Decompressor == "igzip"}
	if c.Containerd.Address == "" {
		return differ.New(dc), func() error { return nil }, nil
	}
	conn, err := repull.Connect(c.Containerd.Address)
	if err != nil {
		return nil, nil, err
	}
	dc.Applier, dc.Content = conn.Applier(), conn.Content()
	return differ.New(dc), conn.Close, nil
}

func serveGRPC(ctx context.Context, l net.Listener, sn *snapshotter.Snapshotter, d diff.Applier, healthy *health.Server) error {
	server := grpc.NewServer(
		grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize),
		grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize),
		grpc.MaxConcurrentStreams(maxCalls), // those beyond wait at the client
		grpc.UnaryInterceptor(unary), grpc.StreamInterceptor(stream(ctx)),
	)
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))
	// Without a Comparer it answers NotImplemented to Diff: containerd's own makes the blob
	// under the lease of its client, which is not passed on.
	diffapi.RegisterDiffServer(server, diffservice.FromApplierAndComparer(d, nil))
	healthapi.RegisterHealthServer(server, healthy)

	served := make(chan error, 1)
	greeting := sockets.Greet(l)
	go func() { served <- server.Serve(greeting) }()
	log.G(ctx).WithField("address", l.Addr().String()).WithField("version", version).Info("serving")
	// Outside systemd this does nothing.
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		log.G(ctx).WithError(err).Warn("systemd could not be notified that the daemon is ready")
	}

	select {
	case err := <-served:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	log.G(ctx).Info("stopping: finishing what is in flight")
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
	greeting.End(greetWithin)
	ended := make(chan struct{})
	go func() { server.GracefulStop(); close(ended) }()
	select {
	case <-ended:
		return <-served
	case <-time.After(finishWithin):
	}
	// Such as a List to a client that does not read, or the walk of a large
	// layer. A transaction that has begun is finished: closing the database waits
	// for it.
	log.G(ctx).Warn("calls in flight did not end in time, and are canceled")
	server.Stop()
	select {
	case <-ended:
	case <-time.After(cancelWithin):
	}
	return nil
}

// mendingService is the name under which grpc.health.v1 answers whether damaged
// layers are healed. The service "" is about writes only: a node that does not heal
// still serves.
const mendingService = "mending"

// setHealth sets the answer of health checks for a service.
func setHealth(h *health.Server, service string, ok bool) {
	status := healthapi.HealthCheckResponse_SERVING
	if !ok {
		status = healthapi.HealthCheckResponse_NOT_SERVING
	}
	h.SetServingStatus(service, status)
}

// unary logs errors at debug level and keeps a panic from ending the daemon.
func unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (_ any, err error) {
	began := time.Now()
	defer func() { err = finish(ctx, info.FullMethod, began, recover(), err) }()
	return handler(ctx, req)
}

// stream does the same, and translates: containerd's snapshotservice returns
// the errors of a List as they are (contrib/snapshotservice/service.go:146). A
// health check that watches ends with the daemon; it would never end by itself,
// and a graceful stop would wait for it.
func stream(daemon context.Context) grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
		began := time.Now()
		defer func() { err = finish(ss.Context(), info.FullMethod, began, recover(), err) }()
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

// finish counts and logs a call that has ended.
func finish(ctx context.Context, method string, began time.Time, panicked any, err error) error {
	if panicked != nil {
		log.G(ctx).WithField("method", method).Errorf("panic: %v\n%s", panicked, debug.Stack())
		err = status.Errorf(codes.Internal, "durable-snapshotter: %v; see its log", panicked)
	}
	name := path.Base(method)
	metrics.Handled.WithLabelValues(name, status.Code(err).String()).Inc()
	metrics.Since(metrics.HandlingSeconds.WithLabelValues(name), began)
	if panicked != nil {
		return err
	}
	if err != nil {
		log.G(ctx).WithField("method", method).WithError(err).Debug("answered with an error")
	}
	return err
}

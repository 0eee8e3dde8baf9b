package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/admin"
	"github.com/durable-snapshotter/durable-snapshotter/internal/sockets"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

// adminServer serves HTTP on admin.sock, and the metrics over TCP if that is configured.
type adminServer struct {
	*admin.Server
	servers []*http.Server
}

// serveAdmin starts to serve. A stop of the daemon cancels requests.
func serveAdmin(ctx context.Context, cfg Config, sn *snapshotter.Snapshotter, given sockets.Listeners) (_ *adminServer, err error) {
	a := &adminServer{Server: admin.New(admin.Config{Images: cfg.imageCheck(), Pprof: cfg.Admin.Pprof}, sn)}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.Close())
		}
	}()
	l, err := given.Listen(ctx, sockets.Admin(cfg.Address))
	if err != nil {
		return nil, err
	}
	a.serve(ctx, l, a.Handler())
	if address := cfg.Admin.MetricsAddress; address != "" {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
		if err != nil {
			return nil, fmt.Errorf("admin.metrics_address: %w", err)
		}
		mux := http.NewServeMux()
		mux.Handle("GET "+admin.MetricsPath, admin.MetricsHandler())
		a.serve(ctx, l, mux)
	}
	return a, nil
}

func (a *adminServer) serve(ctx context.Context, l net.Listener, h http.Handler) {
	server := &http.Server{
		Handler: h, ReadHeaderTimeout: 10 * time.Second,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	a.servers = append(a.servers, server)
	go func() {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.G(ctx).WithError(err).WithField("address", l.Addr().String()).Error("HTTP is not served any more")
		}
	}()
}

// Close ends all connections.
func (a *adminServer) Close() (err error) {
	for _, server := range a.servers {
		err = errors.Join(err, server.Close())
	}
	a.Server.Close()
	return err
}

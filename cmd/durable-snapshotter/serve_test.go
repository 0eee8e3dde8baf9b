package main

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/durable-snapshotter/durable-snapshotter/internal/sockets"
)

// TestStopWithWatcher: a client that watches the health must not keep the daemon from
// stopping.
func TestStopWithWatcher(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := sockets.Listen(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	stopped := make(chan error, 1)
	go func() { stopped <- serveGRPC(ctx, l, nil, nil, health.NewServer()) }()

	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	watch, err := healthapi.NewHealthClient(conn).Watch(t.Context(), &healthapi.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if r, err := watch.Recv(); err != nil || r.Status != healthapi.HealthCheckResponse_SERVING {
		t.Fatalf("got %v, %v", r, err)
	}
	stop()
	select {
	case err := <-stopped:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the daemon waits for a health check that never ends")
	}
}

// slowListener returns a connection only some time after a daemon that stops at that moment.
type slowListener struct {
	*net.UnixListener
	stop func()
}

func (l *slowListener) Accept() (net.Conn, error) {
	c, err := l.UnixListener.Accept()
	if err == nil {
		l.stop()
		time.Sleep(200 * time.Millisecond)
	}
	return c, err
}

// TestStopRefusesNoClient: a client that connects to a socket of systemd's when the daemon stops
// is served, by this daemon or the next.
func TestStopRefusesNoClient(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File() // systemd's
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 2)
	next, end := context.WithCancel(t.Context())
	go func() {
		served <- serveGRPC(ctx, &slowListener{l, stop}, nil, nil, health.NewServer())
		l, err := net.FileListener(f)
		if err == nil {
			err = serveGRPC(next, l, nil, nil, health.NewServer())
		}
		served <- err
	}()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r, err := healthapi.NewHealthClient(conn).Check(t.Context(), &healthapi.HealthCheckRequest{})
	if err != nil || r.Status != healthapi.HealthCheckResponse_SERVING {
		t.Errorf("got %v, %v", r, err)
	}
	end()
	for range 2 {
		if err := <-served; err != nil {
			t.Error(err)
		}
	}
}

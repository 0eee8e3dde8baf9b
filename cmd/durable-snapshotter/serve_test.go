package main

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"
)

// TestStopWithWatcher: a client that watches the health must not keep the daemon from
// stopping.
func TestStopWithWatcher(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := listen(t.Context(), socket)
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

package main

import (
	"context"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

// TestMessengerCloses: a daemon that ends by an error of its own, not by a
// signal, must not wait for its messenger; nor with news that nobody takes.
func TestMessengerCloses(t *testing.T) {
	cfg := Default()
	cfg.Containerd.Address = t.TempDir() + "/nobody.sock"
	cfg.ContentRoot = t.TempDir()
	m := newMessenger(cfg)
	m.run(context.Background(), nil)
	m.lost(&snapshotter.DamagedError{Namespace: "k8s.io", ChainID: "sha256:00", NoBlob: true})
	closed := make(chan error, 1)
	go func() { closed <- m.close() }()
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("still open")
	}
}

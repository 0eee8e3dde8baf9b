package notify

import (
	"context"
	"testing"
	"time"
)

// TestNotifierCloses: a daemon that ends by an error of its own, not by a signal,
// closes its Notifier at once, even when the queue is not empty and containerd does not
// answer.
func TestNotifierCloses(t *testing.T) {
	n := New(Config{
		Address: t.TempDir() + "/none.sock", Snapshotter: "durable", ContentRoot: t.TempDir(), DropImages: true,
	})
	n.Run(context.Background(), nil)
	n.NotifyDamaged("k8s.io/1/sha256:00", "k8s.io", "sha256:00")
	closed := make(chan error, 1)
	go func() { closed <- n.Close() }()
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("still open")
	}
}

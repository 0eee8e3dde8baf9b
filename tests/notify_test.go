package tests

import (
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestNotify plays systemd's part for a unit of Type=notify: it hears that the
// daemon is ready once the socket answers, and that it stops.
func TestNotify(t *testing.T) {
	path := filepath.Join(shortDir(t), "notify")
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close()
	hear := func(want string) {
		t.Helper()
		buf := make([]byte, 256)
		if err := systemd.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if n, err := systemd.Read(buf); err != nil || string(buf[:n]) != want {
			t.Fatalf("heard %q, %v, want %q", buf[:max(n, 0)], err, want)
		}
	}
	disk := newDisk(t, kit.DiskOptions{})
	d, err := kit.NewDaemon(kit.DaemonOptions{
		Binary: shared.bins.Daemon, Dir: disk.Path("durable"), RunDir: shortDir(t), Env: []string{"NOTIFY_SOCKET=" + path},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kittest.Stop(t, d.Process) })
	hear("READY=1")
	makeLayer(t, d, "layer") // it was the truth
	if err := d.Stop(); err != nil {
		t.Fatal(err)
	}
	hear("STOPPING=1")
}

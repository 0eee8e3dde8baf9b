package verbs

import (
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestNotify plays systemd's part for a unit of Type=notify: it is notified that the
// daemon is ready once the socket answers, and that it stops.
func TestNotify(t *testing.T) {
	path := filepath.Join(scratch(t), "notify")
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close()
	receive := func(want string) {
		t.Helper()
		buf := make([]byte, 256)
		if err := systemd.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		if n, err := systemd.Read(buf); err != nil || string(buf[:n]) != want {
			t.Fatalf("received %q, %v, want %q", buf[:max(n, 0)], err, want)
		}
	}
	disk := newDisk(t, kit.DiskOptions{})
	d, err := kit.NewDaemon(kit.DaemonOptions{
		Binary: kittest.Binaries(t).Daemon, Dir: disk.Path("durable"), RunDir: scratch(t), Env: []string{"NOTIFY_SOCKET=" + path},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kittest.Stop(t, d.Process) })
	receive("READY=1")
	kittest.MakeLayer(t, d, "layer") // it was ready
	if err := d.Stop(); err != nil {
		t.Fatal(err)
	}
	receive("STOPPING=1")
}

package bench

import (
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// benchmarkBoot measures a start of the daemon after the machine went down under
// it: the time until its socket answers, and until it has answered about one
// layer of a chain of the usual length, which has not been verified in this boot.
// With a cold cache everything, the program too, comes from the disk.
func (n *node) benchmarkBoot(b *testing.B, cold bool) {
	var socket, stat, recovery []time.Duration
	for b.Loop() {
		b.StopTimer()
		n.goDown(b, cold)
		b.StartTimer()

		start := time.Now()
		if err := n.daemon.Launch(); err != nil {
			b.Fatal(err)
		}
		for answers(n.daemon.Address) != nil {
			if !n.daemon.Running() || time.Since(start) > time.Minute {
				b.Fatal(n.daemon.LogTail(4096))
			}
			time.Sleep(time.Millisecond)
		}
		if err := n.daemon.Healthy(b.Context()); err != nil {
			b.Fatal(err)
		}
		socket = append(socket, time.Since(start))
		b.StopTimer()

		sn, name := kittest.Connect(b, n.daemon), n.layers[deepest+len(stat)*usual+usual-1]
		start = time.Now()
		if info, err := sn.Stat(b.Context(), name); err != nil || info.Name != name {
			b.Fatal(info, err)
		}
		stat = append(stat, time.Since(start))
		last := n.recovered(b)
		if last.Clean || last.Unverified != len(n.layers) {
			b.Fatalf("not the recovery from an unclean shutdown: %+v", last)
		}
		took, err := time.ParseDuration(last.Took)
		if err != nil {
			b.Fatal(err)
		}
		recovery = append(recovery, took)
		b.StartTimer()
	}
	b.ReportMetric(float64(median(socket).Milliseconds()), "socket-ms")
	b.ReportMetric(float64(median(recovery).Milliseconds()), "recovery-ms")
	b.ReportMetric(float64(median(stat).Microseconds())/1000, "first-stat-ms")
}

// goDown ends the daemon and begins another boot, of a machine that has nothing
// in its memory, if cold.
func (n *node) goDown(b *testing.B, cold bool) {
	b.Helper()
	if err := n.daemon.Kill(); err != nil {
		b.Fatal(err)
	}
	if cold {
		if err := n.disk.Remount(); err != nil {
			b.Fatal(err)
		}
		unix.Sync()
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			b.Fatal(err)
		}
	}
	if err := kit.NewBoot(); err != nil {
		b.Fatal(err)
	}
}

package tests

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// benchmarkBoot measures a start of the daemon after the machine went down under
// it: the time until its socket answers, and until it has answered about one
// layer of a chain of the usual length, which nobody has looked at in this boot.
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

		sn, name := client(b, n.daemon), n.layers[deepest+len(stat)*usual+usual-1]
		start = time.Now()
		if info, err := sn.Stat(b.Context(), name); err != nil || info.Name != name {
			b.Fatal(info, err)
		}
		stat = append(stat, time.Since(start))
		last := n.recovered(b)
		if last.Clean || last.Unverified != len(n.layers) {
			b.Fatalf("not the recovery from an unclean boot: %+v", last)
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
	nextBoot(b)
}

// bootID is where the kernel names a boot (random(4)).
const bootID = "/proc/sys/kernel/random/boot_id"

// coverBootID puts a file of ours over the kernel's, in our mount namespace.
var coverBootID = sync.OnceValues(func() (string, error) {
	file := filepath.Join(os.TempDir(), "boot_id")
	if err := os.WriteFile(file, nil, 0o444); err != nil {
		return "", err
	}
	return file, os.NewSyscallError("mount "+bootID, unix.Mount(file, bootID, "", unix.MS_BIND, ""))
})

// nextBoot makes this another boot for every process that asks from now on.
func nextBoot(b *testing.B) {
	b.Helper()
	file, err := coverBootID()
	if err == nil {
		err = os.WriteFile(file, fmt.Appendf(nil, "b0070000-0000-4000-8000-%012x\n", time.Now().UnixNano()&0xFFFFFFFFFFFF), 0o444)
	}
	if err != nil {
		b.Fatal(err)
	}
}

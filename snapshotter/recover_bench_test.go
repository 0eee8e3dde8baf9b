package snapshotter

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// manySnapshots makes a root with n committed snapshots, in chains of ten, each
// with a directory and an empty fs/, committed in the first epoch of the root.
// They have no seals: recovery does not read any.
func manySnapshots(tb testing.TB, n int) string {
	tb.Helper()
	root := tb.TempDir()
	var rows []storage.Row
	now := time.Now().UTC()
	for i := 1; i <= n; i++ {
		name := fmt.Sprintf("k8s.io/%d/sha256:%064x", i, i)
		parent := ""
		if i%10 != 1 {
			parent = rows[len(rows)-1].Info.Name
		}
		info := snapshots.Info{
			Kind: snapshots.KindCommitted, Name: name, Parent: parent, Created: now, Updated: now,
			Labels: map[string]string{layout.LabelTarget: name, layout.LabelDiffID: name},
		}
		rows = append(rows, storage.Row{ID: uint64(i), Info: info, Commit: storage.CommitEntry{
			ID: uint64(i), Name: name, Namespace: "k8s.io", ChainID: layout.ChainIDOf(name, nil), Parent: parent, DiffID: name,
			Entries: 1000, Bytes: 1 << 20, Digest: "sha256:" + strings.Repeat("0", 64), Time: now, Strategy: storage.StrategySyncfs, Epoch: 1,
		}})
		dir := filepath.Join(root, "snapshots", strconv.Itoa(i))
		if err := os.MkdirAll(filepath.Join(dir, "fs"), 0o755); err != nil {
			tb.Fatal(err)
		}
	}
	if _, err := storage.Rebuild(tb.Context(), root, "bench", rows); err != nil {
		tb.Fatal(err)
	}
	return root
}

// BenchmarkRecover measures the time from the start of a daemon to the instant
// at which its socket can answer, and the most memory that the process had: when
// only the daemon was restarted, so that all layers are ready, and when the
// machine went down under it, so that none is. What is looked at in the
// background afterwards is left out; `bench paths` in tests/cmd has the daemon
// itself, from a cold disk.
func BenchmarkRecover(b *testing.B) {
	for _, n := range []int{1_000, 10_000} {
		for _, after := range []string{"restart", "unclean boot"} {
			b.Run(fmt.Sprintf("snapshots=%d/after=%s", n, after), func(b *testing.B) {
				benchmarkRecover(b, manySnapshots(b, n), after == "unclean boot", n)
			})
		}
	}
}

func benchmarkRecover(b *testing.B, root string, unclean bool, n int) {
	quiet(b)
	want, boots := storage.StateReady, 0
	if unclean {
		want = storage.StateUnverified
	}
	recover := func() *Snapshotter {
		s, err := New(b.Context(), Config{Root: root, JournalHistory: 1000, NoBackground: true, BootID: fmt.Sprint("boot-", boots)})
		if err != nil {
			b.Fatal(err)
		}
		return s
	}
	end := func(s *Snapshotter) {
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		if unclean {
			boots++
			forgetStop(b, root)
		}
	}
	end(recover()) // the first daemon finds no word of an earlier one
	forgetPeak(b)
	for b.Loop() {
		s := recover()
		b.StopTimer()
		r, err := s.Inspect(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		got := len(slices.DeleteFunc(r.Layers, func(l verify.Result) bool { return l.State != want }))
		if got != n {
			b.Fatalf("%d of %d snapshots are %s", got, n, want)
		}
		end(s)
		b.StartTimer()
	}
	b.ReportMetric(peakMiB(b), "peak-MiB")
}

// quiet sends the log nowhere, so that a benchmark prints its result only.
func quiet(tb testing.TB) {
	out := log.L.Logger.Out
	log.L.Logger.SetOutput(io.Discard)
	tb.Cleanup(func() { log.L.Logger.SetOutput(out) })
}

// forgetPeak lets the peak start anew, from what is in use now (proc(5),
// clear_refs, value 5).
func forgetPeak(tb testing.TB) {
	tb.Helper()
	debug.FreeOSMemory()
	debug.FreeOSMemory() // what is in a sync.Pool outlives the first
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		tb.Fatal(err)
	}
}

// peakMiB is the peak resident size of this process (proc(5), VmHWM).
func peakMiB(tb testing.TB) float64 {
	tb.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		tb.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				tb.Fatal(err)
			}
			return float64(kib) / 1024
		}
	}
	tb.Fatal("no VmHWM")
	return 0
}

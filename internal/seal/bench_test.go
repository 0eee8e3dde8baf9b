package seal

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// wideTree makes directories with empty files in them.
func wideTree(b testing.TB, dirs, files int) string {
	b.Helper()
	root := b.TempDir()
	for d := range dirs {
		dir := filepath.Join(root, strconv.Itoa(d))
		check(b, os.Mkdir(dir, 0o755))
		for f := range files {
			check(b, unix.Mknod(filepath.Join(dir, strconv.Itoa(f)), unix.S_IFREG|0o644, 0))
		}
	}
	return root
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// BenchmarkWrite seals a warm tree of 30,000 entries, in turn with find(1), which
// prints the same fields but for extended attributes.
func BenchmarkWrite(b *testing.B) {
	root := wideTree(b, 300, 99)
	path := filepath.Join(b.TempDir(), "seal")
	var ours, theirs []time.Duration
	for b.Loop() {
		start := time.Now()
		if _, err := Write(b.Context(), root, path); err != nil {
			b.Fatal(err)
		}
		ours = append(ours, time.Since(start))
		b.StopTimer()
		start = time.Now()
		check(b, exec.Command("find", root, "-printf", `%p %y %m %U %G %n %s %l %T@\n`).Run())
		theirs = append(theirs, time.Since(start))
		b.StartTimer()
	}
	b.ReportMetric(30_001/median(ours).Seconds(), "entries/s")
	b.ReportMetric(float64(median(ours))/float64(median(theirs)), "seal/find")
}

// BenchmarkVerify compares a warm tree with its seal.
func BenchmarkVerify(b *testing.B) {
	root := wideTree(b, 300, 99)
	path, s := sealOf(b, root)
	for b.Loop() {
		if found, err := Verify(b.Context(), root, path, s.Digest, 10); err != nil || len(found) > 0 {
			b.Fatal(found, err)
		}
	}
	b.ReportMetric(30_001*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
}

// BenchmarkVerifyCold drops the kernel's caches of names and inodes before.
func BenchmarkVerifyCold(b *testing.B) {
	root := wideTree(b, 300, 99)
	path, s := sealOf(b, root)
	unix.Sync()
	for b.Loop() {
		b.StopTimer()
		check(b, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0))
		b.StartTimer()
		if found, err := Verify(b.Context(), root, path, s.Digest, 10); err != nil || len(found) > 0 {
			b.Fatal(found, err)
		}
	}
	b.ReportMetric(30_001*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
}

// BenchmarkMemory seals and verifies a layer of a million entries and reports
// the peak of the process's memory.
func BenchmarkMemory(b *testing.B) {
	root := wideTree(b, 1000, 999)
	check(b, os.WriteFile("/proc/self/clear_refs", []byte("5"), 0)) // forget the peak, proc(5)
	for b.Loop() {
		path, s := sealOf(b, root)
		if found, err := Verify(b.Context(), root, path, s.Digest, 10); err != nil || len(found) > 0 {
			b.Fatal(found, err)
		}
	}
	status, err := os.ReadFile("/proc/self/status")
	check(b, err)
	for line := range strings.Lines(string(status)) {
		var kib float64
		if n, _ := fmt.Sscanf(line, "VmHWM: %f", &kib); n == 1 {
			b.ReportMetric(kib/1024, "peak-MiB")
		}
	}
}

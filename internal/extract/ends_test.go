package extract

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

// mixed is a tar with files of all sizes in many directories.
func mixed(t testing.TB, n int) []byte {
	return tarOf(t, repeat(n, func(i int) []item {
		size := []int{0, 100, 5000, early, blockSize, 2*blockSize + 5}[i%6]
		return []item{dirItem(fmt.Sprintf("d%d", i), 0o755), fileItem(fmt.Sprintf("d%d/f", i), strings.Repeat("x", size)), hardlinkItem(fmt.Sprintf("d%d/h", i), fmt.Sprintf("d%d/f", i/2))}
	})...)
}

// nothingLeft fails when descriptors or goroutines are left after fn.
func nothingLeft(t *testing.T, fn func()) {
	t.Helper()
	before, goroutines := descriptors(t), runtime.NumGoroutine()
	fn()
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors are open, %d were before", after, before)
	}
	for range 100 {
		if runtime.NumGoroutine() <= goroutines {
			break
		}
		time.Sleep(10 * time.Millisecond) // one that has returned may still be counted
	}
	if after := runtime.NumGoroutine(); after > goroutines {
		t.Errorf("%d goroutines run, %d did before", after, goroutines)
	}
	if len(layers) != 0 || len(writers) != 0 {
		t.Errorf("%d layers and %d writers are counted still", len(layers), len(writers))
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	treetest.Check(t, err)
	return len(all)
}

// failing is a reader that ends with an error after some bytes.
type failing struct {
	io.Reader
	left int
	fail func() error
}

func (f *failing) Read(p []byte) (int, error) {
	if f.left <= 0 {
		return 0, f.fail()
	}
	n, err := f.Reader.Read(p[:min(len(p), f.left)])
	f.left -= n
	return n, err
}

// TestFailures: an error of the stream, of the disk, of the context and a panic of a library end
// all stages, and come back as what they are.
func TestFailures(t *testing.T) {
	root(t)
	layer := mixed(t, 120)
	mine := errors.New("of the blob")
	for _, after := range []int{0, 1, 512, 100_000, len(layer) / 2, len(layer) - 600, len(layer) - 1} {
		for name, c := range map[string]struct {
			fail func(cancel func()) error
			is   func(error) bool
		}{
			"stream":  {func(func()) error { return mine }, func(err error) bool { return errors.Is(err, mine) }},
			"panic":   {func(func()) error { panic("in a library") }, func(err error) bool { return err != nil && strings.Contains(err.Error(), "in a library") }},
			"context": {func(cancel func()) error { cancel(); return context.Canceled }, func(err error) bool { return errors.Is(err, context.Canceled) }},
			"short":   {func(func()) error { return io.ErrUnexpectedEOF }, func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }},
		} {
			t.Run(fmt.Sprint(name, " after ", after), func(t *testing.T) {
				nothingLeft(t, func() {
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					_, err := Apply(ctx, Options{Dir: t.TempDir(), Tar: &failing{bytes.NewReader(layer), after, func() error { return c.fail(cancel) }}})
					if !c.is(err) {
						t.Errorf("the error is %v", err)
					}
				})
			})
		}
	}
	t.Run("missing directory", func(t *testing.T) {
		nothingLeft(t, func() {
			if _, err := Apply(t.Context(), Options{Dir: filepath.Join(t.TempDir(), "missing"), Tar: bytes.NewReader(layer)}); !errors.Is(err, unix.ENOENT) {
				t.Error(err)
			}
		})
	})
}

// TestFull: on a full disk the error is that of the disk, whatever stage has met it.
func TestFull(t *testing.T) {
	root(t)
	layer := mixed(t, 120)
	for _, size := range []int{16 << 10, 200 << 10, 1 << 20, 5 << 20, 10 << 20} {
		dir := t.TempDir()
		treetest.Check(t, unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)))
		nothingLeft(t, func() {
			if _, err := Apply(t.Context(), Options{Dir: dir, Tar: bytes.NewReader(layer)}); !errors.Is(err, unix.ENOSPC) {
				t.Errorf("%d bytes: %v", size, err)
			}
		})
		treetest.Check(t, unix.Unmount(dir, 0))
	}
	// No inodes: it is the parser that fails.
	dir := t.TempDir()
	treetest.Check(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "nr_inodes=50"))
	if _, err := Apply(t.Context(), Options{Dir: dir, Tar: bytes.NewReader(layer)}); !errors.Is(err, unix.ENOSPC) {
		t.Error(err)
	}
	treetest.Check(t, unix.Unmount(dir, 0))
}

// TestBounds: neither descriptors nor memory grow with the layer.
func TestBounds(t *testing.T) {
	root(t)
	before, most := descriptors(t), 0
	layer := tarOf(t, append(repeat(3*openDirs, func(i int) []item {
		return []item{dirItem(fmt.Sprintf("d%d/e", i), 0o755), fileItem(fmt.Sprintf("d%d/e/f", i), "x"), fileItem(fmt.Sprintf("d%d/e/g", i), "y"), fileItem(fmt.Sprintf("d%d/e/h", i), "")}
	}), fileItem("big", strings.Repeat("0123456789abcdef", 100<<20/16)))...)
	var stats runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&stats)
	heap, peak, n := stats.HeapInuse, uint64(0), 0
	watch := func() {
		runtime.ReadMemStats(&stats)
		peak = max(peak, stats.HeapInuse)
		most = max(most, descriptors(t)-before)
	}
	_, err := Apply(t.Context(), Options{Dir: t.TempDir(), Digests: true, Directory: func(string) {
		if n++; n%16 == 0 {
			watch()
		}
	}, Tar: &failing{bytes.NewReader(layer), len(layer), func() error { watch(); return io.EOF }}})
	treetest.Check(t, err)
	if most > Descriptors+8 {
		t.Errorf("%d descriptors at a time, the limit is %d", most, Descriptors)
	}
	if grown := int64(peak) - int64(heap); grown > 2*Memory {
		t.Errorf("the heap has grown by %d MiB", grown>>20)
	}
	t.Logf("%d descriptors at most; the heap has grown by %d KiB", most, (int64(peak)-int64(heap))>>10)
}

// TestSideBySide: many layers at a time, more than are extracted at a time, become what each
// of them becomes alone.
func TestSideBySide(t *testing.T) {
	root(t)
	layer := mixed(t, 40)
	since := time.Now().Add(-time.Second)
	want := t.TempDir()
	_, err := Apply(t.Context(), Options{Dir: want, Tar: bytes.NewReader(layer)})
	treetest.Check(t, err)
	dirs := make([]string, 2*Layers)
	nothingLeft(t, func() {
		var all sync.WaitGroup
		for i := range dirs {
			dirs[i] = t.TempDir()
			all.Go(func() {
				if _, err := Apply(t.Context(), Options{Dir: dirs[i], Tar: bytes.NewReader(layer)}); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	})
	state := stateOf(t, want, since) // once: reading changes times of access
	for _, dir := range dirs {
		if text := difference(state, stateOf(t, dir, since)); text != "" {
			t.Fatal(text)
		}
	}
}

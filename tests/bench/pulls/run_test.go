package pulls

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

func smallest(t *testing.T, log func(string, ...any)) Options {
	store, err := scratch("images")
	if err != nil {
		t.Fatal(err)
	}
	return Options{
		Images: []string{"two"}, Variants: []string{"overlayfs", "durable", "durable-differ", "fetch"}, Igzip: []bool{false}, Unpacks: []int{1},
		Rounds: 1, FS: "ext4", Disk: "fast", Store: store, Command: "test", Log: log,
	}
}

// TestSmallestRun measures one pull of each kind.
func TestSmallestRun(t *testing.T) {
	before := around(t)
	r, err := Run(t.Context(), smallest(t, t.Logf))
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Pulls) != 4 || len(r.Rows()) != 4 || len(r.Images) != 1 || r.Images[0].Layers != 2 || len(r.Proofs) != 4 || r.Revision == "" {
		t.Fatalf("%+v", r)
	}
	for _, p := range r.Pulls {
		if p.Seconds <= 0 || p.CPU <= 0 || p.Writes == 0 || p.Bytes == 0 || p.Flushes == 0 || p.ContainerdMemory == 0 {
			t.Errorf("nothing was measured: %+v", p)
		}
		daemon, differ := strings.HasPrefix(p.Variant, "durable"), p.Variant == "durable-differ"
		if daemon != (p.DaemonMemory > 0) || daemon != (p.Commits != nil) || daemon != (p.Phases["commit transaction"] > 0) || differ != (p.Phases["apply sync"] > 0) {
			t.Errorf("%s: %+v", p.Variant, p)
		}
		if p.Commits != nil && p.Commits.Count != 2 {
			t.Errorf("%s: %d Commits of an image of two layers", p.Variant, p.Commits.Count)
		}
	}
	if text := r.Table(); strings.Count(text, "\n| two | 1 | no |") != 8 { // two of them in each of the tables of Commits and of phases
		t.Errorf("the table lacks a row:\n%s", text)
	}
	if after := around(t); after != before {
		t.Errorf("the run has left something:\n%s\nbefore it there was\n%s", after, before)
	}
}

// TestFetched: of what was fetched before, a pull asks the registry for no blob; a fetch alone is not
// measured then.
func TestFetched(t *testing.T) {
	r := &run{Options: smallest(t, t.Logf), images: map[string]kit.Pushed{}, disks: map[string]*machineDisk{}}
	r.Scale, r.Variants, r.Fetched = 1, []string{"overlayfs", "fetch"}, true
	defer func() {
		if err := r.close(); err != nil {
			t.Error(err)
		}
	}()
	if err := errors.Join(r.prepare(t.Context()), r.makeImages(t.Context()), r.makeDisks()); err != nil {
		t.Fatal(err)
	}
	if len(r.variants) != 1 || len(r.report.LeftOut) != 1 || !strings.Contains(r.report.Table(), "every blob was fetched before") {
		t.Fatalf("%+v: %+v", r.variants, r.report)
	}
	requests := map[bool]int64{}
	for _, r.Fetched = range []bool{false, true} {
		before := r.store.registry.Requests()
		if _, err := r.once(t.Context(), r.variants[0], r.settings[0]); err != nil {
			t.Fatal(err)
		}
		requests[r.Fetched] = r.store.registry.Requests() - before
	}
	const blobs = 3 // the configuration and two layers
	fetch := requests[false]
	if pull := requests[true] - fetch; pull < 1 || pull > fetch-blobs {
		t.Errorf("%d requests for a pull, %d for a fetch and a pull", fetch, requests[true])
	}
}

// TestCanceledRun: a run that ends within a pull leaves nothing either, and has an error.
func TestCanceledRun(t *testing.T) {
	before := around(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o := smallest(t, func(format string, _ ...any) {
		if strings.HasPrefix(format, "round") {
			cancel()
		}
	})
	o.Variants = []string{"overlayfs", "durable"}
	r, err := Run(ctx, o)
	if !errors.Is(err, context.Canceled) || r == nil || len(r.Pulls) != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if after := around(t); after != before {
		t.Errorf("the run has left something:\n%s\nbefore it there was\n%s", after, before)
	}
}

// TestPacedDisk: a disk with a limit is not faster than that. It may be slower, on a machine with
// other work.
func TestPacedDisk(t *testing.T) {
	before := around(t)
	dir, err := scratch("paced-disk")
	if err != nil {
		t.Fatal(err)
	}
	d, err := newDisk(dir, "ext4", "emmc", 128<<20)
	if err != nil {
		t.Fatal(err)
	}
	p, err := d.prove("emmc")
	t.Logf("%+v, %v", p, err)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if p.Bytes == 0 || p.Bytes > 44e6 || p.Requests == 0 || p.Requests > 1100 {
		t.Errorf("%+v, the limit is %+v", p, Disks["emmc"])
	}
	if after := around(t); after != before {
		t.Errorf("the disk has left something:\n%s\nbefore it there was\n%s", after, before)
	}
}

// TestShapes: images have the sizes that are said of them, within 5 %.
func TestShapes(t *testing.T) {
	for name, want := range map[string]struct{ layers, inodes, mib int }{"golang": {7, 23_000, 992}, "tensorflow": {5, 32_590, 1823}, "tiny": {60, 420, 0}, "zstd": {4, 21_400, 472}} {
		inodes, bytes := 0, int64(0)
		words := vocabulary()
		for i, s := range imageShapes[name].layers {
			for _, e := range s.entries(i, 1, words) {
				inodes++
				bytes += e.Size
			}
		}
		near := func(have, want int) bool { return have >= want*95/100 && have <= want*105/100 }
		if have := int(bytes / mib); len(imageShapes[name].layers) != want.layers || !near(inodes, want.inodes) || !near(have, want.mib) {
			t.Errorf("%s: %d layers, %d inodes, %d MiB, want %+v", name, len(imageShapes[name].layers), inodes, have, want)
		}
	}
}

// TestText: content is the same each time, however it is read, and gzip makes two fifths of it.
func TestText(t *testing.T) {
	read := func(step int) []byte {
		r, all := &text{random: rand.New(rand.NewPCG(1, 2)), words: vocabulary()}, make([]byte, 0, 4*mib)
		for len(all) < cap(all) {
			part := make([]byte, min(step, cap(all)-len(all)))
			if _, err := io.ReadFull(r, part); err != nil {
				t.Fatal(err)
			}
			all = append(all, part...)
		}
		return all
	}
	whole := read(4 * mib)
	if !bytes.Equal(whole, read(1000)) {
		t.Error("another size of reads gives other content")
	}
	var packed bytes.Buffer
	w, err := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.Write(whole)
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	if part := float64(packed.Len()) / float64(len(whole)); part < 0.33 || part > 0.43 {
		t.Errorf("gzip makes %.2f of it", part)
	}
}

// around describes what a run could leave: processes of this namespace, mounts, files and loop
// devices below the temporary directory. The images stay.
func around(t *testing.T) string {
	t.Helper()
	var all []string
	processes, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range processes {
		if text, err := os.ReadFile(file); err == nil {
			all = append(all, "process "+strings.TrimSpace(string(text)))
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], os.TempDir()) {
			all = append(all, "mount "+f[4])
		}
	}
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range loops {
		if text, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(text), os.TempDir()) {
			all = append(all, "loop device of "+string(text))
		}
	}
	files, err := os.ReadDir(os.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if name := f.Name(); name != "images" && name != "lock" && !strings.HasPrefix(name, "Test") {
			all = append(all, "file "+strconv.Quote(name))
		}
	}
	return fmt.Sprint(strings.Join(all, "\n"))
}

package commit

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/v2/core/diff"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestGoldenApplied is TestGolden for the Commit of a layer that our differ has extracted.
// Whatever is in the layer, it syncs its record, which needs no room on the disk, and never the file system. On ext4 the sync
// of the transaction flushes the cache of the disk for the record, too.
func TestGoldenApplied(t *testing.T) {
	for _, c := range []struct{ fs, sync, operation string }{
		{"ext4", "auto", "commit-applied-ext4"}, {"xfs", "auto", "commit-applied"}, {"btrfs", "auto", "commit-applied"}, {"ext4", "syncfs", "commit-applied"},
	} {
		t.Run(c.fs+","+c.sync, func(t *testing.T) {
			disk := newDisk(t, kit.DiskOptions{FS: c.fs, Size: 512 << 20})
			seen := recordApplied(t, disk.Path("durable"), c.sync)
			if *update && c.fs == "ext4" {
				check(t, os.WriteFile(goldenFile(c.operation), []byte(strings.Join(seen, "\n")+"\n"), 0o644))
			}
			if d := diffLines(golden(t, c.operation), seen); d != "" {
				t.Error(d)
			}
			if slices.ContainsFunc(seen, func(line string) bool { return strings.HasPrefix(line, "syncfs") }) {
				t.Error("the file system is synced in Commit")
			}
		})
	}
}

// recordApplied returns what a Commit after an Apply took of the disk.
func recordApplied(t *testing.T, dir, sync string) (seen []string) {
	t.Helper()
	a := newApplier(t, kit.DaemonOptions{Dir: dir, Config: "[diff]\nsync = '" + sync + "'\n"})
	var entries []tarEntry
	for n := range 200 {
		entries = append(entries, entry(fmt.Sprint("file", n), strings.Repeat("x", 5000)))
	}
	layer := a.blob(t, entries...)
	for round := range 3 { // twice for warmth, as in recordOnce
		l := chain(1, fmt.Sprint("round", round))[0]
		a.apply(t, l, "", layer)
		a.take(t)
		check(t, l.commit(t.Context(), a.sn))
		seen = a.take(t)
		check(t, a.sn.Remove(t.Context(), l.name))
		cleanUp(t, a.sn)
		a.take(t)
	}
	check(t, a.daemon.Stop())
	return seen
}

// applier is a daemon whose differ extracts layers, and what the kernel saw of it.
type applier struct {
	*trace
	daemon  *kit.Daemon
	sn      snapshots.Snapshotter
	differ  diff.Applier
	content string // store
}

func newApplier(t *testing.T, o kit.DaemonOptions) *applier {
	t.Helper()
	a := &applier{content: t.TempDir()}
	o.ContentRoot = a.content
	a.daemon, a.trace = traced(t, o)
	a.sn = start(t, a.daemon)
	conn := must[*grpc.ClientConn](t)(grpc.NewClient("unix://"+a.daemon.Address, grpc.WithTransportCredentials(insecure.NewCredentials())))
	t.Cleanup(func() { _ = conn.Close() })
	a.differ = diffproxy.NewDiffApplier(diffapi.NewDiffClient(conn)).(diff.Applier)
	return a
}

type tarEntry struct {
	tar.Header
	content string
}

// blob puts a layer into the content store.
func (a *applier) blob(t *testing.T, entries ...tarEntry) ocispec.Descriptor {
	t.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, e := range entries {
		check(t, w.WriteHeader(&e.Header))
		must[int](t)(w.Write([]byte(e.content)))
	}
	check(t, w.Close())
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(layer.Bytes()), Size: int64(layer.Len())}
	blob := filepath.Join(a.content, "blobs/sha256", desc.Digest.Encoded())
	check(t, os.MkdirAll(filepath.Dir(blob), 0o755))
	check(t, os.WriteFile(blob, layer.Bytes(), 0o444))
	return desc
}

// apply prepares a snapshot and extracts a layer into it. parent is the chain ID of a parent that becomes
// known at Commit, or empty.
func (a *applier) apply(t *testing.T, l link, parent string, layer ocispec.Descriptor) {
	t.Helper()
	labels := map[string]string{"containerd.io/snapshot.ref": l.chainID}
	if parent != "" {
		labels["containerd.io/snapshot/parent-chain-id"] = parent
	}
	mounts, err := a.sn.Prepare(t.Context(), l.key, l.parentName, snapshots.WithLabels(labels))
	check(t, err)
	if _, err := a.differ.Apply(t.Context(), layer, mounts); err != nil {
		t.Fatal(err)
	}
}

// TestCommitLeavesJournal: the Commit after an Apply takes no commit of the journal of ext4, which would wait for
// what others write, too. Prepare and Apply have taken all that it needs.
func TestCommitLeavesJournal(t *testing.T) {
	const layers = 100
	disk := newDisk(t, kit.DiskOptions{FS: "ext4", Size: 512 << 20})
	a := newApplier(t, kit.DaemonOptions{Dir: disk.Path("durable")})
	layer := a.blob(t, entry("file", strings.Repeat("x", 5000)))
	with, parent := 0, ""
	for i := range layers {
		l := chain(1, fmt.Sprint("layer", i))[0]
		l.name, l.parentName = fmt.Sprint(l.name, i), parent
		a.apply(t, l, "", layer)
		before := journalCommits(t, disk)
		check(t, l.commit(t.Context(), a.sn))
		if journalCommits(t, disk) != before {
			with++
		}
	}
	// ext4 commits its journal every five seconds, and the database becomes longer now and then, of its own accord.
	if with > layers/10 {
		t.Errorf("%d of %d Commits came with a commit of the journal", with, layers)
	}
	check(t, a.daemon.Stop())
}

// journalCommits is how many transactions the journal of a disk has committed.
func journalCommits(t *testing.T, disk *kit.Disk) (n int) {
	t.Helper()
	info := must[[]byte](t)(os.ReadFile("/proc/fs/jbd2/" + filepath.Base(disk.Device()) + "-8/info"))
	if _, err := fmt.Sscanf(string(info), "%d transactions", &n); err != nil {
		t.Fatalf("%q: %v", info, err)
	}
	return n
}

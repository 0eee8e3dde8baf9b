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
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

const appliedCommit = "commit-applied"

// TestGoldenApplied is TestGolden for the Commit of a layer that our differ has extracted.
// Whatever is in the layer, it syncs two inodes, and never the file system.
func TestGoldenApplied(t *testing.T) {
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			disk := newDisk(t, kit.DiskOptions{FS: fs, Size: 512 << 20})
			seen := recordApplied(t, disk.Path("durable"))
			if *update && fs == "ext4" {
				check(t, os.WriteFile(goldenFile(appliedCommit), []byte(strings.Join(seen, "\n")+"\n"), 0o644))
			}
			if d := diffLines(golden(t, appliedCommit), seen); d != "" {
				t.Error(d)
			}
			if slices.ContainsFunc(seen, func(line string) bool { return strings.HasPrefix(line, "syncfs") }) {
				t.Error("the file system is synced in Commit")
			}
		})
	}
}

// recordApplied returns what a Commit after an Apply took of the disk.
func recordApplied(t *testing.T, dir string) (seen []string) {
	t.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for n := range 200 {
		check(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint("file", n), Mode: 0o644, Size: 5000}))
		must[int](t)(w.Write(make([]byte, 5000)))
	}
	check(t, w.Close())
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(layer.Bytes()), Size: int64(layer.Len())}
	content := t.TempDir()
	blob := filepath.Join(content, "blobs/sha256", desc.Digest.Encoded())
	check(t, os.MkdirAll(filepath.Dir(blob), 0o755))
	check(t, os.WriteFile(blob, layer.Bytes(), 0o444))

	d, tr := traced(t, kit.DaemonOptions{Dir: dir, ContentRoot: content})
	sn := start(t, d)
	conn, err := grpc.NewClient("unix://"+d.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(t, err)
	defer conn.Close()
	differ := diffproxy.NewDiffApplier(diffapi.NewDiffClient(conn)).(diff.Applier)
	for round := range 3 { // twice for warmth, as in recordOnce
		l := chain(1, fmt.Sprint("round", round))[0]
		mounts, err := sn.Prepare(t.Context(), l.key, "", l.labels())
		check(t, err)
		if _, err := differ.Apply(t.Context(), desc, mounts); err != nil {
			t.Fatal(err)
		}
		tr.take(t)
		check(t, l.commit(t.Context(), sn))
		seen = tr.take(t)
		check(t, sn.Remove(t.Context(), l.name))
		cleanUp(t, sn)
		tr.take(t)
	}
	check(t, d.Stop())
	return seen
}

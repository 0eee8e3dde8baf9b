package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// BenchmarkTenThousandLayers is about a node with as many layers as any has:
// small ones, but each with its seal.
func BenchmarkTenThousandLayers(b *testing.B) {
	n := newNode(b, 10_000)
	b.Run("stat", n.benchmarkStat)
	b.Run("after=unclean boot/cache=cold", func(b *testing.B) { n.benchmarkBoot(b, true) })
	b.Run("after=unclean boot/cache=warm", func(b *testing.B) { n.benchmarkBoot(b, false) })
}

// deepest is the length of one chain of layers on a node; the others have
// usual.
const (
	deepest = 100
	usual   = 10
)

// node is a disk with many layers on it, and a daemon that has verified all of them.
type node struct {
	disk    *kit.Disk
	daemon  *kit.Daemon
	layers  []string // committed names; the deep chain first, each chain base first
	builtin string   // root of the built-in snapshotter, with the same rows
}

func newNode(b *testing.B, layers int) *node {
	b.Helper()
	n := &node{disk: newDisk(b, kit.DiskOptions{})}
	opts := kit.DaemonOptions{Binary: kittest.Binaries(b).Daemon, Dir: n.disk.Path("durable"), RunDir: scratch(b)}
	var err error
	if n.daemon, err = kit.NewDaemon(opts); err != nil {
		b.Fatal(err)
	}
	n.fill(b, layers)
	n.builtin = n.disk.Path("overlayfs")
	copyFile(b, filepath.Join(n.daemon.Root, storage.FileName), filepath.Join(n.builtin, storage.FileName))

	if err := n.daemon.Start(b.Context()); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		kittest.Stop(b, n.daemon.Process)
	})
	n.waitUntilReady(b)
	return n
}

// fill makes the layers with the means of the program, but without containerd's
// two transactions for each, which would take minutes.
func (n *node) fill(b *testing.B, layers int) {
	b.Helper()
	var rows []storage.Row
	for i := range layers {
		chainID, parent := fmt.Sprintf("sha256:%064x", i), ""
		name := fmt.Sprintf("k8s.io/%d/%s", i, chainID)
		if i%usual != 0 || i > 0 && i < deepest {
			parent = n.layers[i-1]
		}
		id := uint64(i + 1)
		dir := filepath.Join(n.daemon.Root, "snapshots", strconv.FormatUint(id, 10))
		if err := writeSmallLayer(filepath.Join(dir, "fs"), i); err != nil {
			b.Fatal(err)
		}
		sealed, err := seal.Write(b.Context(), filepath.Join(dir, "fs"), filepath.Join(dir, "seal"))
		if err != nil {
			b.Fatal(err)
		}
		now := time.Now().UTC()
		rows = append(rows, storage.Row{
			ID: id,
			Info: snapshots.Info{
				Kind: snapshots.KindCommitted, Name: name, Parent: parent, Created: now, Updated: now,
				// What containerd 2.4 gives to each layer.
				Labels: map[string]string{"containerd.io/snapshot.ref": chainID, "containerd.io/snapshot/diff-id": chainID},
			},
			Usage: snapshots.Usage{Inodes: sealed.Inodes, Size: sealed.Blocks},
			Commit: storage.CommitEntry{
				ID: id, Name: name, Namespace: "k8s.io", ChainID: chainID, Parent: parent, DiffID: chainID,
				Entries: sealed.Entries, Bytes: sealed.Bytes, Digest: sealed.Digest, Time: now, Strategy: storage.StrategySyncfs,
			},
		})
		n.layers = append(n.layers, name)
	}
	if _, err := storage.Rebuild(b.Context(), n.daemon.Root, "bench", rows); err != nil {
		b.Fatal(err)
	}
}

// writeSmallLayer makes a layer of six entries.
func writeSmallLayer(root string, i int) error {
	at := func(name string) string { return filepath.Join(root, name) }
	return errors.Join(
		os.MkdirAll(at("usr/bin"), 0o755),
		os.WriteFile(at("usr/bin/program"), fmt.Appendf(nil, "program %d", i), 0o755),
		os.WriteFile(at("usr/config"), fmt.Appendf(nil, "config %d", i), 0o644),
		os.Symlink("usr/bin/program", at("entrypoint")),
	)
}

// waitUntilReady waits until the daemon has verified every layer in the
// background, and found it whole.
func (n *node) waitUntilReady(b *testing.B) {
	b.Helper()
	sn := kittest.Connect(b, n.daemon)
	start := time.Now()
	for {
		states := map[storage.State]int{}
		if err := sn.Walk(b.Context(), func(_ context.Context, info snapshots.Info) error {
			states[storage.State(info.Labels["durable-snapshotter/state"])]++
			return nil
		}); err != nil {
			b.Fatal(err)
		}
		if states[storage.StateReady] == len(n.layers) {
			b.Logf("verified %d layers in the background in %s", len(n.layers), time.Since(start).Round(time.Second))
			return
		}
		if states[storage.StateDamaged] > 0 || time.Since(start) > 5*time.Minute {
			b.Fatalf("layers after %s: %v", time.Since(start), states)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// recovered returns what the log records of the last recovery.
func (n *node) recovered(b *testing.B) (last struct {
	Clean      bool
	Unverified int
	Took       string
}) {
	b.Helper()
	text, err := n.daemon.Log()
	if err != nil {
		b.Fatal(err)
	}
	found := false
	for line := range strings.Lines(text) {
		if strings.Contains(line, `"msg":"recovered"`) {
			found = true
			if err := json.Unmarshal([]byte(line), &last); err != nil {
				b.Fatal(err)
			}
		}
	}
	if !found {
		b.Fatal("the log records no recovery")
	}
	return last
}

package paths

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

const (
	deepest = 128 // length of the first chain, on a node that has so many
	usual   = 10  // of all others
)

// Fewest is how many snapshots there must be.
const Fewest = usual

// node is a disk with many layers on it, and both snapshotters with the same rows.
type node struct {
	disk    *kit.Disk
	daemon  *kit.Daemon
	stock   *kit.Stock
	layers  []string // committed names; the deep chain first, each chain base first
	deep    int      // how many layers the deep chain has
	serving []server // running, the daemon first
}

// server is one of the two.
type server struct {
	variant string
	process *kit.Process
	sn      snapshots.Snapshotter
}

// newNode fills a disk with empty layers, each with its seal.
func newNode(ctx context.Context, dir, fs string, bins kit.Binaries, layers int) (_ *node, err error) {
	n := &node{}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.close())
		}
	}()
	// Five inodes a layer, of which ext4 makes one for 16 KiB.
	size := max(2<<30, int64(layers)*(128<<10))
	if n.disk, err = kit.NewDisk(filepath.Join(dir, "disk"), kit.DiskOptions{FS: fs, Size: size, Mkfs: []string{"-K"}, Direct: true}); err != nil {
		return nil, err
	}
	run := filepath.Join(dir, "run")
	if err := os.MkdirAll(run, 0o700); err != nil {
		return nil, err
	}
	if n.daemon, err = kit.NewDaemon(kit.DaemonOptions{Binary: bins.Daemon, Dir: n.disk.Path("durable"), RunDir: run, LogLevel: "info"}); err != nil {
		return nil, err
	}
	if n.stock, err = kit.NewStock(ctx, n.disk.Path("overlayfs"), run); err != nil {
		return nil, err
	}
	return n, n.fill(ctx, layers)
}

// fill makes the layers with the means of the program, but without containerd's two transactions
// for each, which would take minutes.
func (n *node) fill(ctx context.Context, layers int) error {
	if layers >= 2*deepest {
		n.deep = deepest
	}
	var rows []storage.Row
	now := time.Now().UTC()
	for i := range layers {
		chainID, parent := fmt.Sprintf("sha256:%064x", i), ""
		name := fmt.Sprintf("k8s.io/%d/%s", i, chainID)
		if i < n.deep && i > 0 || i >= n.deep && (i-n.deep)%usual != 0 {
			parent = n.layers[i-1]
		}
		id := uint64(i + 1)
		number := filepath.Join("snapshots", strconv.FormatUint(id, 10))
		dir := filepath.Join(n.daemon.Root, number)
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, "fs"), 0o755), os.MkdirAll(filepath.Join(n.stock.Root, number, "fs"), 0o755)); err != nil {
			return err
		}
		sealed, err := seal.Write(ctx, filepath.Join(dir, "fs"), filepath.Join(dir, "seal"))
		if err != nil {
			return err
		}
		rows = append(rows, storage.Row{
			ID: id,
			Info: snapshots.Info{
				Kind: snapshots.KindCommitted, Name: name, Parent: parent, Created: now, Updated: now,
				// What containerd 2.4 gives to each layer.
				Labels: map[string]string{"containerd.io/snapshot.ref": chainID, "containerd.io/snapshot/diff-id": chainID},
			},
			Usage: snapshots.Usage{Inodes: sealed.Inodes, Size: sealed.Blocks},
			Commit: storage.CommitEntry{
				ID: id, Name: name, Namespace: "k8s.io", ChainID: chainID, Parent: parent, DiffID: chainID, Epoch: 1,
				Entries: sealed.Entries, Bytes: sealed.Bytes, Digest: sealed.Digest, Time: now, Strategy: storage.StrategySyncfs,
			},
		})
		n.layers = append(n.layers, name)
	}
	if _, err := storage.Rebuild(ctx, n.daemon.Root, "bench", rows); err != nil {
		return err
	}
	data, err := os.ReadFile(filepath.Join(n.daemon.Root, storage.FileName))
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(filepath.Join(n.stock.Root, storage.FileName), data, 0o600), n.disk.Sync())
}

// chain is the top of a chain of a length, "" when there is none.
func (n *node) chain(depth int) string {
	switch {
	case depth <= n.deep:
		return n.layers[depth-1]
	case n.deep == 0 && depth <= usual:
		return n.layers[depth-1]
	}
	return ""
}

// serve starts both.
func (n *node) serve(ctx context.Context) error {
	if err := errors.Join(n.daemon.Start(ctx), n.stock.Start(ctx)); err != nil {
		return err
	}
	ours, err := n.daemon.Snapshotter()
	if err != nil {
		return err
	}
	theirs, err := n.stock.Snapshotter()
	n.serving = []server{{Durable, n.daemon.Process, ours}, {Overlayfs, n.stock.Process, theirs}}
	return err
}

// stop stops both.
func (n *node) stop() error {
	var errs []error
	for _, s := range n.serving {
		errs = append(errs, s.sn.Close(), s.process.Stop())
	}
	n.serving = nil
	return errors.Join(errs...)
}

// cold leaves nothing of the disk in memory.
func (n *node) cold() error {
	if err := n.disk.Remount(); err != nil {
		return err
	}
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

func (n *node) close() error {
	err := n.stop()
	if n.disk != nil {
		err = errors.Join(err, n.disk.Close())
	}
	return err
}

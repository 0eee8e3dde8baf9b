package paths

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/filled"
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

// fill makes the layers.
func (n *node) fill(ctx context.Context, layers int) error {
	if layers >= 2*deepest {
		n.deep = deepest
	}
	all := filled.New(n.daemon.Root)
	for i := range layers {
		parent := ""
		if i < n.deep && i > 0 || i >= n.deep && (i-n.deep)%usual != 0 {
			parent = n.layers[i-1]
		}
		name, err := all.Add(ctx, parent, nil)
		if err != nil {
			return err
		}
		n.layers = append(n.layers, name)
	}
	return errors.Join(all.Write(ctx, n.stock.Root), n.disk.Sync())
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

func (n *node) close() error {
	err := n.stop()
	if n.disk != nil {
		err = errors.Join(err, n.disk.Close())
	}
	return err
}

package boot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/filled"
	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/pulls"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// shape is how many entries the layers of an image have, from its base: a distribution, packages, an
// application, its configuration.
var shape = []int{2000, 500, 500, 50, 50, 50, 5, 5, 5, 5}

// Fewest is how many layers there must be: the pause image and three more.
const Fewest = 1 + 3*10

// node is a disk with many layers on it, and both snapshotters with the same rows.
type node struct {
	dir, kind string
	paced     *pulls.Paced // nil: the disk has no limit
	disk      *kit.Disk
	daemon    *kit.Daemon
	stock     *kit.Stock
	pause     string   // name of the layer of the pause image
	images    []string // names of the tops of the others
	layers    int
	entries   int64
	running   program // that must not outlive the run; nil if there is none
}

// program is one of the two.
type program interface {
	Launch() error
	Snapshotter() (snapshots.Snapshotter, error)
	Running() bool
	LogTail(int64) string
	Stop() error
	Kill() error
	socket() string
}

type (
	ours   struct{ *kit.Daemon }
	theirs struct{ *kit.Stock }
)

func (p ours) socket() string   { return p.Address }
func (p theirs) socket() string { return p.Address }

// fill makes a disk, fills it as fast as the machine can, and attaches it as one of its kind.
func (n *node) fill(ctx context.Context, bins kit.Binaries, fs string, layers int) (err error) {
	o := kit.DiskOptions{FS: fs, Direct: true, Mkfs: []string{"-K"}}
	if fs == "ext4" {
		o.Mkfs = append(o.Mkfs, "-i", "4096") // bytes for each inode: files have no content
	}
	// 320 inodes a layer, in the mean, of up to 512 bytes, and as much for names and seals.
	if o.Image, err = place(n.dir, 4<<30+int64(layers)<<20); err != nil {
		return err
	}
	if n.disk, err = kit.NewDisk(filepath.Join(n.dir, "disk"), o); err != nil {
		return err
	}
	run := filepath.Join(n.dir, "run")
	if n.daemon, err = kit.NewDaemon(kit.DaemonOptions{Binary: bins.Daemon, Dir: n.disk.Path("durable"), RunDir: run, LogLevel: "info"}); err != nil {
		return err
	}
	if n.stock, err = kit.NewStock(ctx, n.disk.Path("overlayfs"), run); err != nil {
		return err
	}
	all := filled.New(n.daemon.Root)
	if n.pause, err = all.Add(ctx, "", func(tree string) error { return files(tree, 3) }); err != nil {
		return err
	}
	for n.layers = 1; n.layers < layers; {
		top := ""
		for _, entries := range shape[:min(len(shape), layers-n.layers)] {
			if top, err = all.Add(ctx, top, func(tree string) error { return files(tree, entries) }); err != nil {
				return err
			}
			n.layers++
		}
		n.images = append(n.images, top)
	}
	n.entries = all.Entries
	if err := errors.Join(all.Write(ctx, n.stock.Root), n.disk.Sync()); err != nil {
		return err
	}
	if pulls.Disks[n.kind] == (pulls.Limit{}) {
		return nil
	}
	if err := n.disk.Close(); err != nil {
		return err
	}
	n.disk = nil
	if n.paced, err = pulls.Pace(o.Image, filepath.Join(n.dir, "paced"), n.kind); err != nil {
		return err
	}
	o.Image, o.Made = n.paced.File, true
	n.disk, err = kit.NewDisk(filepath.Join(n.dir, "disk"), o)
	return err
}

// place makes the directories of a node, and the file of its disk, of a size, without blocks.
func place(dir string, bytes int64) (image string, err error) {
	image = filepath.Join(dir, "file")
	if err := os.MkdirAll(filepath.Join(dir, "run"), 0o700); err != nil {
		return "", err
	}
	f, err := os.Create(image)
	if err != nil {
		return "", err
	}
	return image, errors.Join(f.Truncate(bytes), f.Close())
}

// files makes so many entries: directories of up to twenty files, of 3,000 bytes without blocks.
func files(tree string, entries int) error {
	dir := ""
	for i := range entries {
		if i%20 == 0 {
			dir = filepath.Join(tree, fmt.Sprint("directory", i))
			if err := os.Mkdir(dir, 0o755); err != nil {
				return err
			}
			continue
		}
		f, err := os.OpenFile(filepath.Join(dir, fmt.Sprint("file", i)), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Truncate(3000), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

func (n *node) close() error {
	var errs []error
	if n.running != nil {
		errs = append(errs, n.running.Kill())
	}
	if n.disk != nil {
		errs = append(errs, n.disk.Close())
	}
	if n.paced != nil {
		errs = append(errs, n.paced.End())
	}
	return errors.Join(errs...)
}

// Package unpack makes the tree of a layer out of its blob: it extracts the blob as
// containerd's applier does, on the layers below, brings marks in order, and seals the
// tree. It knows which trees lie below one, and calls nothing that decides.
package unpack

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/moby/sys/userns"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/contents"
	"github.com/durable-snapshotter/durable-snapshotter/internal/extract"
	"github.com/durable-snapshotter/durable-snapshotter/internal/gate"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/marks"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Config of an Unpacker.
type Config struct {
	Root         layout.Root
	Gate         *gate.Gate // its View
	Blobs        blobs.Source
	MountOptions []string              // of overlay mounts
	Features     *overlayutil.Features // of the kernel; not changed

	// Ready returns nil when a committed snapshot is known to be whole, with all
	// below it.
	Ready func(name string) error
	// Suspect has a layer verified, because its seal could not be used, and returns
	// the error of the operation that has met it. It does not wait.
	Suspect func(ctx context.Context, e storage.CommitEntry, why error) error
}

// Unpacker makes trees. It may be used from many goroutines.
type Unpacker struct {
	cfg   Config
	space overlayutil.Space
}

// New returns an Unpacker.
func New(cfg Config) *Unpacker {
	return &Unpacker{cfg: cfg, space: overlayutil.SpaceOf(cfg.MountOptions)}
}

// ErrNoRoom: a layer is not extracted again where that would fill the disk.
var ErrNoRoom = errors.New("there is no room to extract it again")

// Room returns an error when a layer of so many bytes and entries cannot be
// extracted beside the old tree without taking the space that others need: after
// it, 5 % of the file system, or 1 GiB if that is less, must be free.
func (u *Unpacker) Room(bytes, entries int64) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(u.cfg.Root.Path, &fs); err != nil {
		return &os.PathError{Op: "statfs", Path: u.cfg.Root.Path, Err: err}
	}
	block := int64(fs.Bsize)
	free := int64(fs.Bavail) * block
	// Half a block is lost on average with each file; more, with small ones.
	need := bytes + entries*block
	reserve := min(int64(fs.Blocks)*block/20, 1<<30)
	if free < need+reserve {
		return fmt.Errorf("%w: it needs %d MiB, %d MiB are free, and %d MiB of them are kept for others", ErrNoRoom, need>>20, free>>20, reserve>>20)
	}
	return nil
}

// Extracted is what is known of a tree that was extracted, and nothing has changed since.
type Extracted struct {
	Dirs *marks.TarDirs         // that have an entry in the tar
	Sums map[uint64]extract.Sum // by inode number; nil when they are not known
	Size int64                  // of the tar, in bytes
}

// Seal seals the tree, of which each entry is changed first, and writes the digests of its content,
// if they are known, in one walk; both files come to the directory dir. digests is the digest of the
// second one, "" if there is none. files, which may be nil, get both.
func (x *Extracted) Seal(ctx context.Context, tree, dir string, change seal.Change, files *fsync.Files) (sum seal.Summary, digests string, err error) {
	file := filepath.Join(dir, layout.SealFile)
	if x.Sums == nil {
		sum, err = seal.ChangeAndWrite(ctx, tree, file, change, files, nil)
		return sum, "", err
	}
	list, err := contents.NewList(tree, filepath.Join(dir, layout.ContentsFile), x.known, files)
	if err != nil {
		return sum, "", err
	}
	sum, err = seal.ChangeAndWrite(ctx, tree, file, change, files, func(e *seal.Entry) error { return list.Add(ctx, e.Path, &e.Stat) })
	digests, e := list.Close()
	return sum, digests, errors.Join(err, e)
}

// known is a contents.Known.
func (x *Extracted) known(inode uint64, size int64) (sum [sha256.Size]byte, ok bool) {
	s, ok := x.Sums[inode]
	return s.SHA256, ok && s.Size == size
}

// Unpack extracts a layer's blob into dir/fs the way containerd's applier does
// (core/diff/apply/apply_linux.go) when it gets our mounts, and checks that it
// was the layer that it claims to be.
func (u *Unpacker) Unpack(ctx context.Context, dir string, b blobs.Blob, lower []Parent) (*Extracted, error) {
	root := filepath.Join(dir, "fs")
	// The mode and owner that Prepare gives it (plugins/snapshots/overlay).
	if err := os.Chmod(root, 0o755); err != nil {
		return nil, err
	}
	if len(lower) > 0 {
		if err := marks.SameOwner(root, lower[0].Tree); err != nil {
			return nil, err
		}
	}
	tar, err := b.Layer(ctx)
	if err != nil {
		return nil, err
	}
	defer tar.Close()
	dirs := marks.NewTarDirs(root)
	o := extract.Options{Dir: root, Tar: tar, Digests: true, Directory: dirs.Add}
	var r extract.Result
	switch {
	case len(lower) == 0:
		o.Whiteouts = extract.Remove
		r, err = extract.Apply(ctx, o)
	case userns.RunningInUserNS():
		work := filepath.Join(dir, "work")
		if err := os.Mkdir(work, 0o711); err != nil {
			return nil, err
		}
		overlay := overlayutil.Options{Work: work, Upper: root, Lower: marks.Trees(parentsOf(lower)), Rest: u.cfg.MountOptions}
		err = mount.WithTempMount(ctx, []mount.Mount{{Type: "overlay", Source: "overlay", Options: overlay.Strings()}}, func(merged string) (err error) {
			// A mount of overlayfs may have other inode numbers than the tree.
			o.Dir, o.Whiteouts, o.Digests = merged, extract.Remove, false
			r, err = extract.Apply(ctx, o)
			return err
		})
	default:
		r, err = extract.Apply(ctx, o)
	}
	if err != nil {
		return nil, b.Blame(ctx, err)
	}
	if r.DiffID != b.DiffID {
		return nil, b.Mismatch(ctx, r.DiffID)
	}
	return &Extracted{dirs, r.Sums, r.Size}, nil
}

// Reseal does for the new tree what Commit does: marks in order, seal, record. It also
// writes the content digests, which a committed layer gets later.
// The tree gets the labels of the one that it replaces first.
func (u *Unpacker) Reseal(ctx context.Context, dir string, entry storage.CommitEntry, info snapshots.Info, lower []Parent, x *Extracted) (storage.CommitEntry, error) {
	tree := filepath.Join(dir, "fs")
	if err := marks.Relabel(ctx, tree, u.cfg.Root.Tree(entry.ID)); err != nil {
		return entry, err
	}
	o := u.options(tree, info.Parent, lower, marks.Origin{Dirs: x.Dirs})
	o.Direct, o.Rebased = !userns.RunningInUserNS() || len(lower) == 0, len(lower) > 0
	n := marks.New(o)
	c, digests, err := x.Seal(ctx, tree, dir, n.Normalize, nil)
	if err != nil {
		return entry, err
	}
	entry.Entries, entry.Bytes, entry.Digest = c.Entries, c.Bytes, c.Digest
	record := CommittedRecord(entry.ID, info, c, n.Found())
	record.Contents = digests
	return entry, layout.ReplaceRecord(dir, record)
}

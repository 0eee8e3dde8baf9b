package unpack

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/moby/sys/userns"
	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/marks"
)

// Tree is one that is going to be committed.
type Tree struct {
	Path       string
	Parent     string // name of the committed snapshot below it, "" when there is none
	Extraction bool   // of a layer, and not written through a mount
	Rebased    bool   // the parent was not known when it was prepared
	ChainID    string // of the layer that is extracted, "" when not known
	Created    time.Time
	// Dirs are the directories that have an entry in its tar, nil when the tar was not read.
	Dirs *marks.TarDirs
	// Again means that a Normalizer has been through it, without the parent if Rebased.
	Again bool
}

// Normalizer is for a tree that is going to be committed. Its parents must be ready
// when Prepare did not know them; nothing is verified here.
func (u *Unpacker) Normalizer(ctx context.Context, t Tree) (*marks.Normalizer, error) {
	lower, err := u.Lower(ctx, t.Parent)
	if err != nil {
		return nil, err
	}
	if t.Rebased {
		// What a directory inherits must not come from a damaged one.
		if err := u.cfg.Ready(t.Parent); err != nil {
			return nil, fmt.Errorf("parent %q: %w", t.Parent, err)
		}
	}
	// containerd's applier writes into the directory itself, unless mknod is
	// forbidden (core/diff/apply/apply_linux.go:34).
	direct := t.Extraction && (!userns.RunningInUserNS() || len(lower) == 0)
	origin := marks.Origin{Dirs: t.Dirs, Since: t.Created, Load: func(ctx context.Context) (*marks.TarDirs, error) {
		return u.TarDirs(ctx, blobs.Layer{ChainID: t.ChainID, Parent: layout.ChainIDOf(t.Parent, nil)}, t.Path)
	}}
	n := u.options(t.Path, t.Parent, lower, origin)
	n.Direct, n.Rebased, n.Again = direct, t.Rebased, t.Again
	return marks.New(n), nil
}

// RootBelow reports whether the root of a layer on the committed snapshot parent, which
// was not known when it was prepared, is as it would be then: that it belongs to root,
// as the parent's does. The error is that of [Unpacker.Normalizer].
func (u *Unpacker) RootBelow(ctx context.Context, parent string) (bool, error) {
	lower, err := u.Lower(ctx, parent)
	if err != nil {
		return false, err
	}
	if err := u.cfg.Ready(parent); err != nil {
		return false, fmt.Errorf("parent %q: %w", parent, err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(lower[0].Tree, &st); err != nil {
		return false, fmt.Errorf("owner of %s: %w", lower[0].Tree, err)
	}
	return st.Uid == 0 && st.Gid == 0, nil
}

// options are for a layer in the directory tree, on the chain lower that begins with
// the committed snapshot parent.
func (u *Unpacker) options(tree, parent string, lower []Parent, origin marks.Origin) marks.Options {
	return marks.Options{
		Space: u.space, Features: *u.cfg.Features, Tree: tree, Lower: parentsOf(lower), Chain: chain{u, parent}, Origin: origin,
	}
}

// TarDirs reads the tar of a layer that was extracted into root. Which blobs
// claim to be the layer follows from manifests; the digest decides.
func (u *Unpacker) TarDirs(ctx context.Context, l blobs.Layer, root string) (dirs *marks.TarDirs, err error) {
	err = u.cfg.Blobs.Try(ctx, l, func(b blobs.Blob) (err error) {
		if dirs, err = u.readTarDirs(ctx, b, root); err != nil {
			return fmt.Errorf("%v: %w", b, err)
		}
		return nil
	})
	return dirs, err
}

func (u *Unpacker) readTarDirs(ctx context.Context, b blobs.Blob, root string) (*marks.TarDirs, error) {
	layer, err := b.Layer(ctx)
	if err != nil {
		return nil, err
	}
	defer layer.Close()
	digester := digest.Canonical.Digester()
	r := io.TeeReader(layer, digester.Hash())
	dirs := marks.NewTarDirs(root)
	if err := dirs.Read(r); err != nil {
		return nil, err
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		return nil, err
	}
	if got := digester.Digest(); got != b.DiffID {
		return nil, b.Mismatch(ctx, got)
	}
	return dirs, nil
}

package layers

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/log"
	"github.com/moby/sys/userns"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/marks"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/recorded"
	"github.com/durable-snapshotter/durable-snapshotter/internal/unpack"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// inheritance compares what layers have inherited with the layers below.
type inheritance struct {
	table    *table
	unpack   *unpack.Unpacker
	root     layout.Root
	space    overlayutil.Space
	suspect  func(ctx context.Context, e storage.CommitEntry, why error) error
	warnOnce func(ctx context.Context, key string, fields log.Fields, message string)
}

// errNoTar: whether a directory has inherited its attributes is known to the
// layer's tar only, and there is no blob of it.
var errNoTar = errors.New("its tar cannot be read")

// errBelow: what a layer below shows may be wrong itself.
var errBelow = errors.New("a layer below it is not known to be right")

// findings compares what a layer has taken from the layers below when it
// was committed with what their seals show: the attributes of the directories that
// have no entry in its tar, and, where its root is opaque, the names that it hides.
// A layer may differ that was committed while one below it had lost a directory,
// by a version that took attributes from the disk.
//
// Only seals are read as long as nothing differs. Where something does, the tar
// decides, out of the layer's blob: a difference counts only when the layer can be
// extracted again, and when nothing is wrong with the layers below, which the same
// mistake may have made wrong. The error wraps errNoTar when there is no good blob,
// and errBelow. Every error means that nothing is known.
//
// In a user namespace nothing is compared. There the kernel made the tree, through a
// mount: it copies directories up, and those that it makes in the place of removed
// ones look like ours.
func (i *inheritance) findings(ctx context.Context, l *layer, e storage.CommitEntry) (found []finding.Finding, err error) {
	if e.Digest == "" || e.Parent == "" || userns.RunningInUserNS() {
		return nil, nil
	}
	chain, err := i.unpack.Lower(ctx, e.Parent)
	if err != nil {
		return nil, err
	}
	with := e.Digest
	for _, p := range chain {
		with += " " + p.Entry.Digest
	}
	i.table.mu.Lock()
	known := l.agrees == with
	e.ChainID = recorded.ChainID(e, i.table.find)
	i.table.mu.Unlock()
	if known {
		return nil, nil
	}
	if err := i.sealedForMounts(e); err != nil {
		return nil, err
	}
	found, err = marks.CompareInherited(ctx, marks.Sealed{
		File: filepath.Join(i.root.Dir(e.ID), layout.SealFile), Digest: e.Digest, Space: i.space, Chain: i.unpack.Chain(e.Parent),
		Tar: func(ctx context.Context) (*marks.TarDirs, error) { return i.tarOf(ctx, e) },
	}, verify.MaxFindings)
	switch below := (*marks.BelowError)(nil); {
	case errors.Is(err, mtree.ErrUnsealed) && !errors.As(err, &below) && !i.unpack.Exchanged(ctx, e.Ref()):
		err = i.suspect(ctx, e, err) // its own seal
	case err == nil && len(found) > 0:
		err = i.rightBelow(ctx, e.Parent, chain)
	}
	if err != nil || len(found) > 0 {
		return found, err
	}
	i.table.mu.Lock()
	l.agrees = with
	i.table.mu.Unlock()
	return nil, nil
}

// tarOf reads which directories have entries in the tar of a layer. The error wraps
// errNoTar when there is no good blob.
func (i *inheritance) tarOf(ctx context.Context, e storage.CommitEntry) (*marks.TarDirs, error) {
	dirs, err := i.unpack.TarDirs(ctx, verify.BlobLayer(e), i.root.Tree(e.ID))
	if blobs.Unusable(err) {
		err = fmt.Errorf("%w: %w", errNoTar, err)
	}
	return dirs, err
}

// sealedForMounts returns an error when a layer's marks are in another space than our
// mounts use: the configuration was changed since, and what hides what is another
// question than at its Commit.
func (i *inheritance) sealedForMounts(e storage.CommitEntry) error {
	r, err := layout.ReadRecord(i.root.Dir(e.ID))
	if err != nil {
		return err
	}
	if r.Overlay == nil || r.Overlay.Space != string(i.space) {
		return fmt.Errorf("the marks of snapshots/%d are not those that mounts use now, %s", e.ID, i.space)
	}
	return nil
}

// rightBelow returns an error of kind errBelow unless the layers of a chain are whole
// and have inherited what they must.
func (i *inheritance) rightBelow(ctx context.Context, name string, chain []unpack.Parent) error {
	if err := i.table.Ready(name); err != nil {
		return fmt.Errorf("%w: %w", errBelow, err)
	}
	for _, p := range slices.Backward(chain) {
		l := i.table.layer(p.Entry)
		if l == nil {
			return fmt.Errorf("%w: snapshots/%d is not known", errBelow, p.Entry.ID)
		}
		found, err := i.findings(ctx, l, p.Entry)
		if err == nil && len(found) > 0 {
			err = errors.New(found[0].String())
		}
		if err != nil {
			return fmt.Errorf("%w: snapshots/%d: %w", errBelow, p.Entry.ID, err)
		}
	}
	return nil
}

// add adds to the result of a verification that has found nothing what
// findings finds. When that is not possible, damage of this kind that was
// found before is not disproved. Its error is that of ctx.
func (i *inheritance) add(ctx context.Context, l *layer, e storage.CommitEntry, c *verify.Result) error {
	found, err := i.findings(ctx, l, e)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		i.notCompared(ctx, e, err)
		i.table.mu.Lock()
		found := l.state.State == storage.StateDamaged && slices.ContainsFunc(l.state.Findings, func(f finding.Finding) bool { return f.Below })
		i.table.mu.Unlock()
		if found {
			c.State, c.Depth, c.Deep = verify.NotComparable, storage.DepthMetadata, time.Time{}
			c.Reason = fmt.Sprintf("what it has inherited cannot be compared: %v", err)
		}
	case len(found) > 0:
		c.Damaged(found...)
		c.Depth, c.Deep = storage.DepthContent, time.Time{}
	}
	return nil
}

// notCompared logs once why nothing is known. A lost seal is logged by suspect.
func (i *inheritance) notCompared(ctx context.Context, e storage.CommitEntry, err error) {
	if errors.Is(err, mtree.ErrUnsealed) {
		return
	}
	i.warnOnce(ctx, "inherited "+e.Digest, log.Fields{"name": e.Name, "id": e.ID, "reason": err.Error()},
		"what a layer has inherited from those below cannot be compared with them; nothing is changed")
}

package workload

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// inMemory is a content store of one blob.
type inMemory []byte

func (b inMemory) ReaderAt(context.Context, ocispec.Descriptor) (content.ReaderAt, error) {
	return &blob{Reader: bytes.NewReader(b)}, nil
}

type blob struct{ *bytes.Reader }

func (*blob) Close() error  { return nil }
func (b *blob) Size() int64 { return b.Reader.Size() }

// Extract applies the layer's tar onto mounts as containerd does it. With sync
// it requests the sync that containerd offers, a syncfs at the end of the
// extraction.
func (l *Layer) Extract(ctx context.Context, mounts []mount.Mount, sync bool) error {
	if err := l.Apply(ctx, apply.NewFileSystemApplier(inMemory(l.Tar)), mounts, diff.WithSyncFs(sync)); err != nil {
		return err
	}
	return l.writeLate(mounts)
}

// Apply has an applier extract the layer into mounts.
func (l *Layer) Apply(ctx context.Context, applier diff.Applier, mounts []mount.Mount, opts ...diff.ApplyOpt) error {
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: l.DiffID, Size: int64(len(l.Tar))}
	got, err := applier.Apply(ctx, desc, mounts, opts...)
	if err != nil {
		return fmt.Errorf("extract %s: %w", l.Name, err)
	}
	if got.Digest != l.DiffID {
		return fmt.Errorf("extract %s: read %s instead of %s", l.Name, got.Digest, l.DiffID)
	}
	return nil
}

// writeLate writes what is in the layer and not in its tar, if it is Late.
func (l *Layer) writeLate(mounts []mount.Mount) error {
	if !l.Late {
		return nil
	}
	upper, _, err := Directories(mounts)
	if err != nil {
		return err
	}
	name := filepath.Join(upper, "late")
	return errors.Join(os.WriteFile(name, bytes.Repeat([]byte(l.DiffID), 1000), 0o600), os.Chtimes(name, modTime, modTime))
}

// Reference is what containerd makes of the layer in a directory, with the mounts that a
// snapshotter has for it.
func (l *Layer) Reference(ctx context.Context, scratch string) (kit.Tree, error) {
	dir, err := os.MkdirTemp(scratch, "reference")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	upper := filepath.Join(dir, "fs")
	if err := os.Mkdir(upper, 0o755); err != nil {
		return nil, err
	}
	mounts := []mount.Mount{{Type: "bind", Source: upper, Options: []string{"rw", "rbind"}}}
	if l.Parent != "" {
		mounts = []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"upperdir=" + upper}}}
	}
	if err := l.Extract(ctx, mounts, false); err != nil {
		return nil, err
	}
	return Tree(upper)
}

// PutBlob puts the layer into a content store.
func (l *Layer) PutBlob(store string) error {
	dir := filepath.Join(store, "blobs", l.DiffID.Algorithm().String())
	return errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, l.DiffID.Encoded()), l.Tar, 0o444))
}

// Labels are those that containerd's unpacker sends with Prepare and Commit.
func (l *Layer) Labels() snapshots.Opt {
	labels := map[string]string{
		snapshots.LabelSnapshotRef:    l.ChainID,
		snapshots.LabelSnapshotDiffID: l.DiffID.String(),
	}
	if l.Parent != "" {
		labels["containerd.io/snapshot/parent-chain-id"] = path.Base(l.Parent)
	}
	return snapshots.WithLabels(labels)
}

// Key is the key of an extraction, in the form of containerd's back end.
func (l *Layer) Key(unique string) string {
	return fmt.Sprintf("%s/%s/%s", l.namespace(), unique, fmt.Sprintf(snapshots.UnpackKeyFormat, unique, l.ChainID))
}

// Directories returns where the mounts of a snapshot lie on the disk: the
// directory that is written to, if any, and those that are only read, highest
// first.
func Directories(mounts []mount.Mount) (upper string, lower []string, err error) {
	if len(mounts) != 1 {
		return "", nil, fmt.Errorf("%d mounts, want one", len(mounts))
	}
	m := mounts[0]
	switch m.Type {
	case "bind":
		if m.ReadOnly() {
			return "", []string{m.Source}, nil
		}
		return m.Source, nil, nil
	case "overlay":
		for _, o := range m.Options {
			if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
				upper = dir
			}
			if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok {
				// Extractions quote, without need, to hide it from the applier.
				lower = strings.Split(strings.ReplaceAll(dirs, `\`, ""), ":")
			}
		}
		return upper, lower, nil
	}
	return "", nil, fmt.Errorf("a mount of type %q", m.Type)
}

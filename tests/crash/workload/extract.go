package workload

import (
	"bytes"
	"context"
	"fmt"
	"path"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
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
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: l.DiffID, Size: int64(len(l.Tar))}
	got, err := apply.NewFileSystemApplier(inMemory(l.Tar)).Apply(ctx, desc, mounts, diff.WithSyncFs(sync))
	if err != nil {
		return fmt.Errorf("extract %s: %w", l.Name, err)
	}
	if got.Digest != l.DiffID {
		return fmt.Errorf("extract %s: read %s instead of %s", l.Name, got.Digest, l.DiffID)
	}
	return nil
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

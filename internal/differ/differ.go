// Package differ is the diff service for containerd: it extracts layers into the
// snapshots of this root, and hands everything else to containerd's own diff service.
//
// containerd's transfer service has exactly one applier for a snapshotter, named by
// differ in unpack_config (core/unpack/unpacker.go), and does not try another one. So
// what is not extracted here must be done all the same: an encrypted layer, a media type
// of others, mounts of another snapshotter. containerd's diff service does it, with its
// list of differs and its stream processors.
//
// That list may name this differ, too. A layer that is handed on carries a mark among
// its payloads, which containerd passes on as they are; when it comes back, the answer
// is NotImplemented, and the list goes on.
package differ

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/marks"
	"github.com/durable-snapshotter/durable-snapshotter/internal/metrics"
	"github.com/durable-snapshotter/durable-snapshotter/internal/unpack"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

// Snapshots is what the Differ needs of the snapshotter, see [snapshotter.Snapshotter].
type Snapshots interface {
	Apply(ctx context.Context, mounts []mount.Mount, extract snapshotter.Extract) error
}

// Config of a Differ.
type Config struct {
	Snapshots   Snapshots
	ContentRoot string // of containerd's content store; "": blobs are read through containerd
	// Own extracts layers here. Without it, all are handed on.
	Own bool
	// Applier is containerd's diff service, Content its content store. Both are nil when
	// containerd's socket is not known.
	Applier diff.Applier
	Content content.Provider
}

// Differ is a diff.Applier. It may be used from many goroutines.
type Differ struct {
	cfg   Config
	store *blobs.Store
}

var _ diff.Applier = (*Differ)(nil)

// New returns a Differ.
func New(cfg Config) *Differ { return &Differ{cfg: cfg, store: blobs.Open(cfg.ContentRoot)} }

// handedOn marks a layer that was handed on, in its payloads. containerd looks payloads up
// by the names of its stream processors, and leaves others alone.
const handedOn = "durable-snapshotter/handed-on"

// Apply extracts a layer into mounts, and makes it durable if they belong to an extraction
// of this snapshotter. It returns the descriptor of the layer's tar. The error is
// NotImplemented when nothing was done and nobody else can be called.
func (d *Differ) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	var cfg diff.ApplyConfig
	for _, opt := range opts {
		if err := opt(ctx, desc, &cfg); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	if ns, ok := namespaces.Namespace(ctx); ok {
		ctx = namespaces.WithNamespace(ctx, ns) // for calls of containerd, too
	}
	tar, err := d.apply(ctx, desc, mounts)
	if not := (*notHere)(nil); errors.As(err, &not) {
		return d.handOn(ctx, desc, mounts, cfg, not)
	}
	if err != nil {
		metrics.Applies.WithLabelValues(metrics.Failed).Inc()
		return ocispec.Descriptor{}, err
	}
	metrics.Applies.WithLabelValues(metrics.OK).Inc()
	metrics.ApplyBytes.Add(float64(tar.Size))
	return tar, nil
}

// notHere is why a layer is not extracted here. Nothing was written.
type notHere struct{ error }

func (e *notHere) Unwrap() error { return e.error }

func (d *Differ) apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount) (tar ocispec.Descriptor, err error) {
	if !d.cfg.Own {
		return tar, &notHere{errors.New("switched off")}
	}
	if err := blobs.Extractable(desc.MediaType); err != nil {
		return tar, &notHere{err}
	}
	err = d.cfg.Snapshots.Apply(ctx, mounts, func(ctx context.Context, root string, whiteouts bool) (*marks.TarDirs, error) {
		x, err := d.extract(ctx, desc, root, whiteouts)
		tar = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: x.DiffID, Size: x.Size}
		return x.Dirs, err
	})
	if errors.Is(err, snapshotter.ErrNotOurs) {
		err = &notHere{err}
	}
	return tar, err
}

// extract extracts a blob of the content store.
func (d *Differ) extract(ctx context.Context, desc ocispec.Descriptor, root string, whiteouts bool) (x unpack.Extracted, err error) {
	blob, err := d.open(ctx, desc)
	if err != nil {
		return x, err
	}
	defer blob.Close()
	layer, err := blobs.Decompress(untilDone{ctx, content.NewReader(blob)})
	if err != nil {
		return x, fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	defer layer.Close()
	if x, err = unpack.Extract(ctx, root, layer, whiteouts); err != nil {
		err = fmt.Errorf("blob %s: %w", desc.Digest, err)
	}
	return x, err
}

// open opens a blob on disk, or else through containerd.
func (d *Differ) open(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	blob, err := d.store.ReaderAt(ctx, desc)
	if err == nil || d.cfg.Content == nil {
		return blob, err
	}
	blob, cerr := d.cfg.Content.ReaderAt(ctx, desc)
	if cerr != nil {
		return nil, fmt.Errorf("%w; through containerd: %w", err, cerr)
	}
	if size := blob.Size(); size != desc.Size {
		_ = blob.Close() // nothing was read
		return nil, fmt.Errorf("blob %s has %d bytes, its descriptor %d: %w", desc.Digest, size, desc.Size, errdefs.ErrFailedPrecondition)
	}
	return blob, nil
}

// untilDone ends reading with a context.
type untilDone struct {
	ctx context.Context
	io.Reader
}

func (r untilDone) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

// handOn has containerd's diff service apply a layer.
func (d *Differ) handOn(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, cfg diff.ApplyConfig, why error) (ocispec.Descriptor, error) {
	if _, back := cfg.ProcessorPayloads[handedOn]; back || d.cfg.Applier == nil {
		return ocispec.Descriptor{}, fmt.Errorf("layer %s: %v: %w", desc.Digest, why, errdefs.ErrNotImplemented)
	}
	log.G(ctx).WithError(why).WithField("digest", desc.Digest).Debug("a layer is handed on to containerd's diff service")
	payloads := map[string]typeurl.Any{handedOn: &anypb.Any{TypeUrl: handedOn}}
	for name, payload := range cfg.ProcessorPayloads {
		payloads[name] = payload
	}
	tar, err := d.cfg.Applier.Apply(ctx, desc, mounts, diff.WithPayloads(payloads), diff.WithSyncFs(cfg.SyncFs))
	if err != nil {
		metrics.Applies.WithLabelValues(metrics.Failed).Inc()
		return tar, fmt.Errorf("containerd's diff service: %w", err)
	}
	metrics.Applies.WithLabelValues(metrics.HandedOn).Inc()
	return tar, nil
}

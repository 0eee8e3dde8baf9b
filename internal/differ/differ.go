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

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/extract"
	"github.com/durable-snapshotter/durable-snapshotter/internal/inflate"
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
	// Igzip decompresses gzip by igzip(1) where that is installed.
	Igzip bool
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

// handedOn marks a layer that was handed on, in its payloads. containerd finds payloads
// by the names of its stream processors, and leaves others alone.
const handedOn = "durable-snapshotter/handed-on"

// Apply extracts a layer into mounts, and makes it durable if they belong to an extraction
// of this snapshotter. It returns the descriptor of the layer's tar. The error is
// NotImplemented when nothing was done and containerd's diff service cannot be called.
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
	err = d.cfg.Snapshots.Apply(ctx, mounts, func(ctx context.Context, root string, whiteouts extract.Whiteouts, files *fsync.Files) (*unpack.Extracted, error) {
		dirs := marks.NewTarDirs(root)
		r, err := d.extract(ctx, desc, extract.Options{Dir: root, Whiteouts: whiteouts, Digests: true, Directory: dirs.Add, Files: files})
		tar = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: r.DiffID, Size: r.Size}
		return &unpack.Extracted{Dirs: dirs, Sums: r.Sums, Size: r.Size}, err
	})
	if errors.Is(err, snapshotter.ErrNotOurs) {
		err = &notHere{err}
	}
	return tar, err
}

// extract extracts a blob.
func (d *Differ) extract(ctx context.Context, desc ocispec.Descriptor, o extract.Options) (r extract.Result, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("blob %s: %w", desc.Digest, err)
		}
	}()
	blob, tar, err := d.open(ctx, desc)
	if err != nil {
		return r, err
	}
	defer blob.Close()
	defer tar.Close()
	o.Tar = untilDone{ctx, tar}
	if r, err = extract.Apply(ctx, o); err == nil {
		metrics.ApplyBytes.WithLabelValues(inflate.Program(tar)).Add(float64(r.Size))
	}
	return r, err
}

// open opens a blob on disk, or else through containerd, and decompresses it.
func (d *Differ) open(ctx context.Context, desc ocispec.Descriptor) (blob io.Closer, tar io.ReadCloser, err error) {
	file, err := d.store.File(desc)
	if err == nil {
		if tar, err = inflate.File(ctx, file, d.igzip()); err != nil {
			return nil, nil, errors.Join(err, file.Close())
		}
		return file, tar, nil
	}
	if d.cfg.Content == nil {
		return nil, nil, err
	}
	at, cerr := d.cfg.Content.ReaderAt(ctx, desc)
	if cerr != nil {
		return nil, nil, fmt.Errorf("%w; through containerd: %w", err, cerr)
	}
	if size := at.Size(); size != desc.Size {
		_ = at.Close() // nothing was read
		return nil, nil, fmt.Errorf("it has %d bytes, its descriptor %d: %w", size, desc.Size, errdefs.ErrFailedPrecondition)
	}
	if tar, err = inflate.Stream(content.NewReader(at)); err != nil {
		return nil, nil, errors.Join(err, at.Close())
	}
	return at, tar, nil
}

// igzip is the program for gzip, "" for none.
func (d *Differ) igzip() string {
	if !d.cfg.Igzip {
		return ""
	}
	return inflate.Igzip()
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

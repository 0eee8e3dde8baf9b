package refill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/internal/library"
	"github.com/durable-snapshotter/durable-snapshotter/internal/repull"
)

// Bytes is a good blob of a layer that lies outside of containerd's content store.
type Bytes struct {
	Digest digest.Digest // "" when it is not known yet
	Size   int64
	// Open returns the blob from its beginning.
	Open func(context.Context) (io.ReadCloser, error)
}

// sourceLabel begins the labels of blobs that name where they were pulled from. The
// registry's host follows.
const sourceLabel = "containerd.io/distribution.source."

// PutBack stores a blob of a layer in containerd's content store, with the labels that the one
// in its place has, when that is missing or bad. It returns false when there is nothing to do:
// containerd has a good one, or no manifest on record refers to these bytes. Then a collection
// would take them at once, as those of images whose layers are discarded after unpacking.
//
// All bytes are in the store before the bad blob is deleted, which is done as Drop does it. A
// lease keeps the blob until it has the row that the manifest refers to.
func PutBack(ctx context.Context, c repull.View, layer repull.Layer, b Bytes) (put bool, err error) {
	ctx, cancel := context.WithCancel(namespaces.WithNamespace(ctx, layer.Namespace))
	defer cancel() // ends the stream of the writer
	l, err := c.Library().Read(ctx, layer.Snapshotter)
	if err != nil {
		return false, err
	}
	if b.Digest == "" {
		if b.Digest, err = b.digest(ctx); err != nil {
			return false, err
		}
	}
	from := refersTo(l, layer, b.Digest)
	if from == "" {
		return false, nil
	}
	root, err := c.ContentRoot(ctx)
	if err != nil {
		return false, err
	}
	info, known := l.Blobs[b.Digest]
	flaw := library.Missing
	if known {
		if flaw, err = c.Library().Flaw(ctx, info, root); err != nil || flaw == "" {
			return false, err
		}
	}
	lease, err := c.Leases().Create(ctx, leases.WithRandomID(), leases.WithExpiration(leaseFor))
	if err != nil {
		return false, fmt.Errorf("put back blob %s: %w", b.Digest, err)
	}
	defer func() { err = errors.Join(err, c.Tidy(ctx, lease)) }()
	return store(leases.WithLease(ctx, lease.ID), c, layer, b, l.Blobs[from], repull.Blob{Digest: b.Digest, Size: info.Size, Flaw: flaw})
}

// store is PutBack within its lease.
func store(ctx context.Context, c repull.View, layer repull.Layer, b Bytes, manifest content.Info, bad repull.Blob) (bool, error) {
	fail := func(err error) (bool, error) { return false, fmt.Errorf("put back blob %s: %w", b.Digest, err) }
	src, err := b.Open(ctx)
	if err != nil {
		return fail(&BytesError{err})
	}
	defer src.Close()
	w, err := content.OpenWriter(ctx, c.Content(), content.WithRef("durable-snapshotter-"+b.Digest.String()))
	if err != nil {
		return fail(err)
	}
	defer w.Close()
	if err := w.Truncate(0); err != nil {
		return fail(err)
	}
	if _, err := io.Copy(w, src); err != nil {
		return fail(err)
	}
	if got := w.Digest(); got != b.Digest {
		return fail(&BytesError{fmt.Errorf("its bytes have the digest %s", got)})
	}
	rows, err := rowsOf(ctx, c, b.Digest)
	if err != nil {
		return fail(err)
	}
	if len(rows) > 0 {
		if _, err := c.DropBlobs(ctx, layer, []repull.Blob{bad}); err != nil {
			return fail(err)
		}
	}
	labels := rows[layer.Namespace].Labels
	if labels == nil {
		labels = sources(manifest)
	}
	if err := w.Commit(ctx, b.Size, b.Digest, content.WithLabels(labels)); err != nil && !errdefs.IsAlreadyExists(err) {
		return fail(err)
	}
	delete(rows, layer.Namespace)
	if err := share(ctx, c, rows); err != nil {
		return fail(err)
	}
	return true, nil
}

// BytesError is the error of the bytes to store, with which containerd has nothing to do.
type BytesError struct{ error }

func (e *BytesError) Unwrap() error { return e.error }

// digest reads the bytes to find out their digest.
func (b Bytes) digest(ctx context.Context) (digest.Digest, error) {
	src, err := b.Open(ctx)
	if err != nil {
		return "", &BytesError{err}
	}
	defer src.Close()
	digester := digest.Canonical.Digester()
	if _, err := io.Copy(digester.Hash(), src); err != nil {
		return "", &BytesError{err}
	}
	return digester.Digest(), nil
}

// refersTo returns a manifest on record whose labels refer to a blob as that of a layer, "" when
// there is none.
func refersTo(l *library.Library, layer repull.Layer, blob digest.Digest) digest.Digest {
	for _, m := range l.Manifests {
		if m.Digest == "" || m.Layer(layer.ChainID.String()) != blob {
			continue
		}
		for label, child := range l.Blobs[m.Digest].Labels {
			if strings.HasPrefix(label, "containerd.io/gc.ref.content.") && child == blob.String() {
				return m.Digest
			}
		}
	}
	return ""
}

// sources are the labels that name where a blob was pulled from.
func sources(info content.Info) map[string]string {
	found := map[string]string{}
	for label, value := range info.Labels {
		if strings.HasPrefix(label, sourceLabel) {
			found[label] = value
		}
	}
	return found
}

// rowsOf returns the rows of a blob, by namespace.
func rowsOf(ctx context.Context, c repull.View, d digest.Digest) (map[string]content.Info, error) {
	all, err := c.Namespaces(ctx)
	if err != nil {
		return nil, err
	}
	rows := map[string]content.Info{}
	for _, ns := range all {
		info, err := c.Content().Info(namespaces.WithNamespace(ctx, ns), d)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("get blob %s in namespace %s: %w", d, ns, err)
		}
		rows[ns] = info
	}
	return rows, nil
}

// share makes rows anew that were deleted with a bad blob, now that there is a good one.
// containerd makes one without any bytes being sent.
func share(ctx context.Context, c repull.View, rows map[string]content.Info) error {
	for _, ns := range slices.Sorted(maps.Keys(rows)) {
		info, ctx := rows[ns], namespaces.WithNamespace(ctx, ns)
		w, err := content.OpenWriter(ctx, c.Content(), content.WithRef("durable-snapshotter-"+info.Digest.String()),
			content.WithDescriptor(ocispec.Descriptor{Digest: info.Digest, Size: info.Size}))
		if err == nil {
			w.Close() // its own store does not share: the next pull of that namespace fetches it
			continue
		}
		if !errdefs.IsAlreadyExists(err) {
			return fmt.Errorf("record blob %s in namespace %s: %w", info.Digest, ns, err)
		}
		if _, err := c.Content().Update(ctx, info, "labels"); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("label blob %s in namespace %s: %w", info.Digest, ns, err)
		}
	}
	return nil
}

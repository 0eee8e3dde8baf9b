package repull

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/internal/library"
)

// GoodBlobError is returned by Drop when containerd has a blob of the layer whose
// digest is right, with the manifest and the config that lead to it. Then the layer
// can be healed from it, and nothing is dropped.
type GoodBlobError struct {
	Layer     Layer
	Namespace string // in which containerd has it
	Blob      digest.Digest
	Encrypted bool
	Root      string // of containerd's content store
	// Configured is the content_root in which no good blob of it was found.
	Configured string
}

func (e *GoodBlobError) Error() string {
	why := fmt.Sprintf("content_root %q is not the content store of this containerd; set it to %q and restart durable-snapshotter, which heals the layer then", e.Configured, e.Root)
	if e.Encrypted {
		why = "it is encrypted, and only containerd can extract it; remove the image and pull it again"
	} else if sameFile(e.Configured, e.Root) {
		why = "the layer can be healed from it: durable-snapshotter repair --apply"
	}
	return fmt.Sprintf("nothing is dropped of %v: containerd has a good blob of it, %s in namespace %s: %s", e.Layer, e.Blob, e.Namespace, why)
}

// Is makes it a failed precondition in the sense of containerd.
func (e *GoodBlobError) Is(target error) bool { return target == errdefs.ErrFailedPrecondition }

// UnknownBlobError is returned by Drop when an image has the layer, or may have it,
// and nothing shows which of its blobs is the layer's. Then it is not known whether
// that is good, and nothing is dropped.
type UnknownBlobError struct {
	Layer  Layer
	Config digest.Digest // of the image
}

func (e *UnknownBlobError) Error() string {
	return fmt.Sprintf("nothing is dropped of %v: the blob of the layer is not known: the image with the config %s is unpacked on it, and neither the config nor labels name the layer; remove that image, or pull it again under another name", e.Layer, e.Config)
}

// Is makes it a failed precondition in the sense of containerd.
func (e *UnknownBlobError) Is(target error) bool { return target == errdefs.ErrFailedPrecondition }

// evidence returns nil when containerd itself shows that a layer cannot be healed:
// of each manifest that has it, in any namespace, the blob of the layer is missing or
// bad, or one of the documents that alone lead to the blob is. own is the library of
// the layer's namespace, keys are the names of the snapshots on the layer.
//
// Manifests of other namespaces count only when their blob is proven to be the
// layer: any client may store one that claims so.
func (c *Containerd) evidence(ctx context.Context, layer Layer, own *library.Library, keys map[string]bool, root, configured string) error {
	name := layer.ChainID.String()
	all, err := c.listNamespaces(ctx)
	if err != nil {
		return err
	}
	libraries := []*library.Library{own}
	for _, ns := range all {
		if ns == layer.Namespace {
			continue
		}
		l, err := c.lib.Read(namespaces.WithNamespace(ctx, ns), layer.Snapshotter)
		if err != nil {
			return fmt.Errorf("namespace %s: %w", ns, err)
		}
		libraries = append(libraries, l)
	}
	x := examiner{c: c, root: root, libraries: libraries, flaws: map[digest.Digest]string{}}
	for _, l := range libraries {
		for _, m := range l.Manifests {
			has := m.Above(name) != nil
			if !has && (l != own || !keys[m.Unpacked]) {
				continue
			}
			if m.Digest == "" {
				continue // the manifest is missing, or bad
			}
			bad, err := x.anyBad(ctx, m.Documents())
			if err != nil {
				return err
			}
			if bad {
				continue
			}
			blob := m.Layer(name)
			if blob == "" {
				if l != own {
					continue
				}
				return &UnknownBlobError{layer, m.Config}
			}
			good, err := x.goodLayer(ctx, m, name, l == own)
			if err != nil {
				return err
			}
			if good {
				encrypted, err := x.encrypted(ctx, m, blob)
				if err != nil {
					return err
				}
				return &GoodBlobError{layer, l.Namespace, blob, encrypted, root, configured}
			}
		}
	}
	return nil
}

// examiner reads each blob once.
type examiner struct {
	c         *Containerd
	root      string
	libraries []*library.Library
	flaws     map[digest.Digest]string
}

// find returns the record of a blob, and a context of a namespace that has one.
// containerd gives out a blob only in such a namespace; the file is one for all.
func (x *examiner) find(ctx context.Context, d digest.Digest) (context.Context, content.Info, bool) {
	for _, l := range x.libraries {
		if info, ok := l.Blobs[d]; ok {
			return namespaces.WithNamespace(ctx, l.Namespace), info, true
		}
	}
	return ctx, content.Info{}, false
}

func (x *examiner) flaw(ctx context.Context, d digest.Digest) (string, error) {
	if flaw, ok := x.flaws[d]; ok {
		return flaw, nil
	}
	flaw := library.Missing
	ctx, info, ok := x.find(ctx, d)
	if ok {
		var err error
		if flaw, err = x.c.lib.Flaw(ctx, info, x.root); err != nil {
			return "", err
		}
	}
	x.flaws[d] = flaw
	return flaw, nil
}

func (x *examiner) anyBad(ctx context.Context, all []digest.Digest) (bool, error) {
	for _, d := range all {
		if flaw, err := x.flaw(ctx, d); err != nil || flaw != "" {
			return true, err
		}
	}
	return false, nil
}

// encrypted reports whether a blob is encrypted, by its media type in the manifest.
func (x *examiner) encrypted(ctx context.Context, m library.Manifest, blob digest.Digest) (bool, error) {
	ctx, info, ok := x.find(ctx, m.Digest)
	if !ok {
		return false, nil
	}
	doc, err := x.c.lib.ReadManifest(ctx, info)
	if err != nil || doc == nil {
		return false, err
	}
	return slices.ContainsFunc(doc.Layers, func(l ocispec.Descriptor) bool {
		return l.Digest == blob && strings.Contains(l.MediaType, "+encrypted")
	}), nil
}

// goodLayer reports whether containerd has the blob of a layer. When the digest of
// one is right, and it cannot be decompressed to see what it holds, benefit decides.
func (x *examiner) goodLayer(ctx context.Context, m library.Manifest, name string, benefit bool) (bool, error) {
	blob := m.Layer(name)
	flaw, err := x.flaw(ctx, blob)
	if err != nil || flaw != "" {
		return false, err
	}
	ctx, info, _ := x.find(ctx, blob)
	diffID := m.DiffIDs[len(m.Below(name))]
	// containerd sets the label when it has extracted the blob and seen the diff ID.
	if info.Labels[labels.LabelUncompressed] == diffID.String() {
		return true, nil
	}
	got, err := x.c.lib.DiffID(ctx, info)
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	if err != nil {
		return benefit, nil
	}
	return got == diffID, nil
}

package images

import (
	"context"
	"fmt"
	"time"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/protobuf/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/go-digest"
)

// healedLabel is what Announce changes in the record of an image.
const healedLabel = "durable-snapshotter/healed"

// Announce tells the CRI plugin of the images that have a layer which was healed
// in place: it changes a label in their records, upon which the plugin reads them
// again. An image that is not ready in all its layers is left out, for it would be
// listed, too. The names of the others are returned.
func (c *Containerd) Announce(ctx context.Context, layer Layer) (names []string, err error) {
	ctx = namespaces.WithNamespace(ctx, layer.Namespace)
	l, err := c.readLibrary(ctx, layer.Snapshotter)
	if err != nil {
		return nil, fmt.Errorf("announce %v: %w", layer, err)
	}
	ready := map[digest.Digest]bool{}
	for _, m := range l.manifests {
		if m.unpacked == "" || m.above(layer.ChainID.String()) == nil {
			continue
		}
		if _, err := c.snapshotter(layer).Stat(ctx, m.unpacked); err == nil {
			ready[m.digest] = true
		}
	}
	all, err := c.listImages(ctx)
	if err != nil {
		return nil, fmt.Errorf("announce %v: %w", layer, err)
	}
	now := time.Now().UTC().Format(time.RFC3339)
	for _, i := range all {
		if _, ok := l.leadsTo(target(i), ready); !ok {
			continue
		}
		_, err := c.images.Update(ctx, &imagesapi.UpdateImageRequest{
			// The target is not changed, but containerd 2.4.2 panics without one.
			Image:      &imagesapi.Image{Name: i.Name, Target: i.Target, Labels: map[string]string{healedLabel: now}},
			UpdateMask: &types.FieldMask{Paths: []string{"labels." + healedLabel}},
		})
		if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return names, fmt.Errorf("announce image %s: %w", i.Name, err)
		}
		names = append(names, i.Name)
	}
	return names, nil
}

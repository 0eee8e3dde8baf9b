package repull

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
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

// Announce notifies the CRI plugin of the images that have one of the layers, which
// were healed in place: it changes a label in their records, upon which the plugin
// reads them again. An image that is not ready in all its layers is left out, for it
// would be listed, too. The names of the others are returned, each once.
//
// The content store of a namespace is read once, however many layers of it there
// are. After an error some images were announced; call again with all layers.
func (c *Containerd) Announce(ctx context.Context, layers []Layer) (names []string, err error) {
	type place struct{ namespace, snapshotter string }
	chains := map[place][]string{}
	var places []place
	for _, l := range layers {
		p := place{l.Namespace, l.Snapshotter}
		if chains[p] == nil {
			places = append(places, p)
		}
		chains[p] = append(chains[p], l.ChainID.String())
	}
	for _, p := range places {
		more, perr := c.announce(namespaces.WithNamespace(ctx, p.namespace), p.snapshotter, chains[p])
		names = append(names, more...)
		if perr != nil {
			err = errors.Join(err, fmt.Errorf("announce layers in namespace %s: %w", p.namespace, perr))
		}
	}
	return names, err
}

func (c *Containerd) announce(ctx context.Context, snapshotter string, chains []string) (names []string, err error) {
	l, err := c.lib.Read(ctx, snapshotter)
	if err != nil {
		return nil, err
	}
	ready := map[digest.Digest]bool{}
	for _, m := range l.Manifests {
		if m.Digest == "" || m.Unpacked == "" || !slices.ContainsFunc(chains, func(name string) bool { return m.Above(name) != nil }) {
			continue
		}
		if _, err := c.snapshotter(Layer{Snapshotter: snapshotter}).Stat(ctx, m.Unpacked); err == nil {
			ready[m.Digest] = true
		}
	}
	all, err := c.listImages(ctx)
	if err != nil {
		return nil, err
	}
	// The value is new each time, also on a board whose clock stands still.
	value := time.Now().UTC().Format(time.RFC3339) + " " + rand.Text()
	var errs []error
	for _, i := range all {
		if _, ok := l.LeadsTo(target(i), ready); !ok {
			continue
		}
		_, err := c.images.Update(ctx, &imagesapi.UpdateImageRequest{
			// The target is not changed, but containerd 2.4.2 panics without one.
			Image:      &imagesapi.Image{Name: i.Name, Target: i.Target, Labels: map[string]string{healedLabel: value}},
			UpdateMask: &types.FieldMask{Paths: []string{"labels." + healedLabel}},
		})
		if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("image %s: %w", i.Name, err))
			continue
		}
		names = append(names, i.Name)
	}
	return names, errors.Join(errs...)
}

package buildkit

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// commit makes an image of what a container has changed, with another command, as nerdctl
// commit does: a diff of its snapshot, a config and a manifest, an image, unpacked.
func (n *node) commit(t *testing.T, container, ref string, command ...string) {
	t.Helper()
	ctx, cl, err := n.Client(t.Context())
	check(t, err)
	defer cl.Close()
	ctx, release, err := cl.WithLease(ctx)
	check(t, err)
	defer func() { check(t, release(context.WithoutCancel(ctx))) }()

	c := must[client.Container](t)(cl.LoadContainer(ctx, container))
	info := must[containers.Container](t)(c.Info(ctx))
	from := must[client.Image](t)(c.Image(ctx))
	store := cl.ContentStore()
	manifest := must[ocispec.Manifest](t)(images.Manifest(ctx, store, from.Target(), platforms.Default()))
	var config ocispec.Image
	check(t, json.Unmarshal(must[[]byte](t)(content.ReadBlob(ctx, store, manifest.Config)), &config))

	layer := must[ocispec.Descriptor](t)(rootfs.CreateDiff(ctx, info.SnapshotKey, cl.SnapshotService("durable"), cl.DiffService()))
	diffID := must[digest.Digest](t)(images.GetDiffID(ctx, store, layer))
	config.RootFS.DiffIDs, config.Config.Cmd = append(config.RootFS.DiffIDs, diffID), command
	config.History = append(config.History, ocispec.History{CreatedBy: "commit"})
	manifest.Layers = append(manifest.Layers, layer)
	manifest.Versioned, manifest.MediaType = specs.Versioned{SchemaVersion: 2}, ocispec.MediaTypeImageManifest

	manifest.Config = put(ctx, t, store, ocispec.MediaTypeImageConfig, config, nil)
	keeps := map[string]string{"containerd.io/gc.ref.content.0": manifest.Config.Digest.String()}
	for i, l := range manifest.Layers {
		keeps[fmt.Sprintf("containerd.io/gc.ref.content.%d", i+1)] = l.Digest.String()
	}
	target := put(ctx, t, store, ocispec.MediaTypeImageManifest, manifest, keeps)
	img := must[images.Image](t)(cl.ImageService().Create(ctx, images.Image{Name: ref, Target: target}))
	check(t, client.NewImage(cl, img).Unpack(ctx, "durable"))
}

func put(ctx context.Context, t *testing.T, store content.Store, mediaType string, v any, labels map[string]string) ocispec.Descriptor {
	t.Helper()
	body := must[[]byte](t)(json.Marshal(v))
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(body), Size: int64(len(body))}
	check(t, content.WriteBlob(ctx, store, d.Digest.String(), bytes.NewReader(body), d, content.WithLabels(labels)))
	return d
}

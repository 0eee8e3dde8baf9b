package repull

import (
	"context"
	"fmt"
	"slices"
	"strings"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// holder is something that stands on a damaged layer and is no layer itself.
type holder struct {
	key       string // of its snapshot
	container *containersapi.Container
}

func (h holder) String() string {
	if h.container == nil {
		return "snapshot " + h.key
	}
	l := h.container.Labels
	what := []string{"container", h.container.ID}
	if l["io.cri-containerd.kind"] == "sandbox" {
		what[0] = "sandbox"
	}
	if pod := l["io.kubernetes.pod.name"]; pod != "" {
		what = append(what, fmt.Sprintf("(%s)", strings.TrimSuffix(l["io.kubernetes.pod.namespace"]+"/"+pod+"/"+l["io.kubernetes.container.name"], "/")))
	}
	return strings.Join(what, " ")
}

// HeldError is returned by Drop when containers, running or not, stand on the damaged
// layer. Images and snapshots are as they were.
type HeldError struct {
	Layer   Layer
	Holders []string        // what they are, with their identifiers
	Images  []string        // the names that Drop would delete
	Blobs   []Blob          // bad ones that were dropped nevertheless, see [Options]
	Lacking []digest.Digest // blobs of the layer that containerd has no record of, as after they were discarded
}

func (e *HeldError) Error() string {
	cure := "remove what holds it, then it can be dropped and pulled again"
	if len(e.Blobs)+len(e.Lacking) > 0 && len(e.Images) > 0 {
		cure += fmt.Sprintf("; or bring back the blobs to heal it in place: ctr -n %s content fetch %s", e.Layer.Namespace, e.Images[0])
	}
	return fmt.Sprintf("drop %v: held by %s: %s", e.Layer, strings.Join(e.Holders, ", "), cure)
}

// Is makes it a failed precondition in the sense of containerd.
func (e *HeldError) Is(target error) bool { return target == errdefs.ErrFailedPrecondition }

// findHolders finds the containers, and the other active snapshots, that stand on
// one of keys. Both lists are needed: the snapshotter does not know which snapshot
// is a container's, and containerd cannot list what is not a container's.
func (c *Containerd) findHolders(ctx context.Context, layer Layer, top []row, keys map[string]bool) ([]holder, error) {
	containers, err := c.listContainers(ctx, layer.Snapshotter)
	if err != nil {
		return nil, err
	}
	sn := c.snapshotter(layer)
	var holders []holder
	for _, container := range containers {
		info, err := sn.Stat(ctx, container.SnapshotKey)
		if errdefs.IsNotFound(err) {
			continue // a container without its snapshot holds nothing
		}
		stands := slices.ContainsFunc(top, func(r row) bool { return r.key == container.SnapshotKey })
		if err != nil && !stands {
			return nil, fmt.Errorf("get the snapshot of container %s: %w", container.ID, err)
		}
		if stands || keys[info.Parent] {
			holders = append(holders, holder{container.SnapshotKey, container})
		}
	}
	for _, r := range top {
		if r.kind == snapshots.KindCommitted || isExtraction(r.key) ||
			slices.ContainsFunc(containers, func(c *containersapi.Container) bool { return c.SnapshotKey == r.key }) {
			continue
		}
		// The snapshotter keeps what containerd has removed until the next garbage
		// collection.
		if _, err := sn.Stat(ctx, r.key); errdefs.IsNotFound(err) {
			continue
		}
		holders = append(holders, holder{key: r.key})
	}
	return holders, nil
}

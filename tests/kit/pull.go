package kit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/containerd/v2/core/transfer/registry"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/platforms"
	"golang.org/x/sync/semaphore"
)

// Way is one of the ways in which images reach a node. Each unpacks layers with
// code, and with locks, of its own.
type Way string

// The ways to pull.
const (
	ByTransfer Way = "transfer" // containerd's transfer service, as ctr image pull
	ByClient   Way = "client"   // containerd's client library, as nerdctl
	ByCRI      Way = "cri"      // the CRI plugin, as the kubelet; in CRINamespace only
)

// Ways lists all of them.
var Ways = []Way{ByTransfer, ByClient, ByCRI}

// Puller pulls images from a registry on loopback.
type Puller struct {
	Client      *client.Client
	CRI         *CRI // for ByCRI
	Snapshotter string
	Unpacks     int // of ByClient, see ContainerdOptions
	views       atomic.Int64
}

// Pull pulls an image into a namespace. The context's end cancels it.
func (p *Puller) Pull(ctx context.Context, way Way, namespace, ref string) error {
	ctx = namespaces.WithNamespace(ctx, namespace)
	var err error
	switch way {
	case ByTransfer:
		err = p.transfer(ctx, ref)
	case ByClient:
		opts := []client.RemoteOpt{
			client.WithPullUnpack, client.WithPullSnapshotter(p.Snapshotter),
			client.WithResolver(docker.NewResolver(docker.ResolverOptions{
				Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost)),
			})),
		}
		if p.Unpacks > 0 {
			opts = append(opts, client.WithUnpackOpts([]client.UnpackOpt{client.WithUnpackLimiter(semaphore.NewWeighted(int64(p.Unpacks)))}))
		}
		_, err = p.Client.Pull(ctx, ref, opts...)
	case ByCRI:
		if namespace != CRINamespace {
			return fmt.Errorf("pull %s by the CRI plugin into namespace %q: it has only %q", ref, namespace, CRINamespace)
		}
		err = p.CRI.Pull(ctx, ref)
	default:
		return fmt.Errorf("pull %s: unknown way %q", ref, way)
	}
	if err != nil {
		return fmt.Errorf("pull %s into %s by %s: %w", ref, namespace, way, err)
	}
	return nil
}

func (p *Puller) transfer(ctx context.Context, ref string) error {
	source, err := registry.NewOCIRegistry(ctx, ref, registry.WithDefaultScheme("http"))
	if err != nil {
		return err
	}
	return p.Client.Transfer(ctx, source, image.NewStore(ref,
		image.WithPlatforms(platforms.DefaultSpec()), image.WithAllMetadata,
		image.WithUnpack(platforms.DefaultSpec(), p.Snapshotter)))
}

// View reads what a container would see of a committed snapshot: its tree, and
// which names are hardlinks of each other, see [Links].
func (p *Puller) View(ctx context.Context, namespace, name string) (t Tree, links map[string]string, err error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	// The lease keeps the view from a collection.
	ctx, release, err := p.Client.WithLease(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, release(ctx)) }()
	s, key := p.Client.SnapshotService(p.Snapshotter), "kit-view-"+strconv.FormatInt(p.views.Add(1), 10)
	mounts, err := s.View(ctx, key, name)
	if err != nil {
		return nil, nil, fmt.Errorf("view of %s in %s: %w", name, namespace, err)
	}
	defer func() { err = errors.Join(err, s.Remove(ctx, key)) }()
	return read(ctx, mounts)
}

// Container is View for the snapshot of a container, which has the container's ID as its key.
func (p *Puller) Container(ctx context.Context, namespace, id string) (Tree, map[string]string, error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	mounts, err := p.Client.SnapshotService(p.Snapshotter).Mounts(ctx, id)
	if err != nil {
		return nil, nil, fmt.Errorf("mounts of container %s: %w", id, err)
	}
	return read(ctx, mounts)
}

// read reads what mounts show.
func read(ctx context.Context, mounts []mount.Mount) (t Tree, links map[string]string, err error) {
	err = mount.WithReadonlyTempMount(ctx, mounts, func(dir string) (err error) {
		if t, err = Fingerprint(dir); err == nil {
			links, err = Links(dir, t)
		}
		return err
	})
	return t, links, err
}

// Links maps each name of a tree in dir that has other names, too, to the first of
// them.
func Links(dir string, t Tree) (map[string]string, error) {
	type id struct{ dev, ino uint64 }
	all := map[id][]string{}
	for name, n := range t {
		if n.Phantom || n.Mode&fs.ModeDir != 0 {
			continue
		}
		info, err := os.Lstat(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		st := info.Sys().(*syscall.Stat_t)
		all[id{st.Dev, st.Ino}] = append(all[id{st.Dev, st.Ino}], name)
	}
	links := map[string]string{}
	for _, names := range all {
		slices.Sort(names)
		for _, name := range names {
			if len(names) > 1 {
				links[name] = names[0]
			}
		}
	}
	return links, nil
}

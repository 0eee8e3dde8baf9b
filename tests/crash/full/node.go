package full

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/containerd/v2/core/transfer/registry"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// The names by which containerd knows its snapshotters.
const (
	builtIn = "overlayfs"
	proxied = "durable"
)

// namespace of all that is done in containerd: that of the CRI plugin. It stands in the names
// of snapshots, and must be the same in the run that records and in one that examines.
const namespace = kit.CRINamespace

// node is a running containerd and a client of it.
type node struct {
	containerd  *kit.Containerd
	client      *client.Client
	cri         *kit.CRI // nil: images are pulled by the transfer service
	run         string   // directory of sockets and logs
	hosts       string
	snapshotter string
	views       atomic.Int64
}

// boot starts containerd with its root in dir and its sockets in run, which must
// not exist and is removed at its end. address is the socket of the proxied
// snapshotter. With byCRI, it has its CRI plugin, by which images are pulled.
func (b *Bench) boot(ctx context.Context, snapshotter, dir, address, run string, byCRI bool) (_ *node, err error) {
	n := &node{hosts: b.hosts, snapshotter: snapshotter, run: run}
	if err := os.Mkdir(run, 0o700); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.stop())
		}
	}()
	opts := kit.ContainerdOptions{Binaries: b.binaries, Dir: dir, RunDir: n.run}
	if snapshotter == proxied {
		opts.Daemon = &kit.Daemon{Address: address, Root: filepath.Join(filepath.Dir(dir), snapshotterDir)}
	}
	if byCRI {
		opts.CRI = &kit.CRIOptions{
			Pause: host + "/none:latest", Snapshotter: snapshotter,
			Images: fmt.Sprintf("[plugins.'io.containerd.cri.v1.images'.registry]\n    config_path = '%s'", b.hosts),
		}
	}
	if n.containerd, err = kit.StartContainerd(ctx, opts); err != nil {
		return n, err
	}
	n.containerd.Namespace = namespace
	if n.client, err = n.containerd.Client(); err != nil || !byCRI {
		return n, err
	}
	if n.cri, err = kit.DialCRI(n.containerd); err != nil {
		return n, err
	}
	return n, n.cri.Redial(ctx)
}

// stop ends containerd as a power cut would: what it still had to do, it has
// to do without a farewell.
func (n *node) stop() error {
	var errs []error
	if n.cri != nil {
		errs = append(errs, n.cri.Close())
	}
	if n.client != nil {
		errs = append(errs, n.client.Close())
	}
	if n.containerd != nil && n.containerd.Process != nil {
		errs = append(errs, n.containerd.Kill())
	}
	return errors.Join(append(errs, os.RemoveAll(n.run))...)
}

// pull pulls an image by the CRI plugin, as the kubelet does, or by the transfer service, as
// ctr does.
func (n *node) pull(ctx context.Context, ref string) error {
	if n.cri != nil {
		if err := n.cri.Pull(ctx, ref); err != nil {
			return fmt.Errorf("pull %s: %w", ref, err)
		}
		return nil
	}
	ctx = namespaces.WithNamespace(ctx, namespace)
	source, err := registry.NewOCIRegistry(ctx, ref, registry.WithHostDir(n.hosts))
	if err != nil {
		return fmt.Errorf("pull %s: %w", ref, err)
	}
	store := image.NewStore(ref,
		image.WithPlatforms(platforms.DefaultSpec()), image.WithAllMetadata,
		image.WithUnpack(platforms.DefaultSpec(), n.snapshotter))
	if err := n.client.Transfer(ctx, source, store); err != nil {
		return fmt.Errorf("pull %s: %w", ref, err)
	}
	return nil
}

// remove removes an image and waits until its garbage is collected, as ctr
// image rm --sync does.
func (n *node) remove(ctx context.Context, ref string) error {
	ctx = namespaces.WithNamespace(ctx, namespace)
	if n.cri != nil { // it has further names of its own
		spec := &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}}
		if _, err := n.cri.Images.RemoveImage(ctx, spec); err != nil {
			return fmt.Errorf("remove %s: %w", ref, err)
		}
	}
	err := n.client.ImageService().Delete(ctx, ref, images.SynchronousDelete())
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove %s: %w", ref, err)
	}
	return nil
}

// prune has the garbage collected: deleting a lease, and waiting, is how ctr
// does it.
func (n *node) prune(ctx context.Context) error {
	ctx = namespaces.WithNamespace(ctx, namespace)
	l, err := n.client.LeasesService().Create(ctx, leases.WithRandomID())
	if err == nil {
		err = n.client.LeasesService().Delete(ctx, l, leases.SynchronousDelete)
	}
	if err != nil {
		return fmt.Errorf("prune: %w", err)
	}
	return nil
}

// unlease deletes all leases, as time does with those of clients that went
// away, and collects what they held.
func (n *node) unlease(ctx context.Context) error {
	ctx = namespaces.WithNamespace(ctx, namespace)
	all, err := n.client.LeasesService().List(ctx)
	if err != nil {
		return fmt.Errorf("list leases: %w", err)
	}
	for _, l := range all {
		if err := n.client.LeasesService().Delete(ctx, l); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("delete lease: %w", err)
		}
	}
	return n.prune(ctx)
}

// container prepares a snapshot for a container that outlives its client.
func (n *node) container(ctx context.Context, key, top string) error {
	ctx = namespaces.WithNamespace(ctx, namespace)
	_, err := n.client.SnapshotService(n.snapshotter).Prepare(ctx, key, top,
		snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "yes"}))
	if err != nil {
		return fmt.Errorf("prepare container %s: %w", key, err)
	}
	return nil
}

// uncontainer removes the snapshot of a container.
func (n *node) uncontainer(ctx context.Context, key string) error {
	ctx = namespaces.WithNamespace(ctx, namespace)
	if err := n.client.SnapshotService(n.snapshotter).Remove(ctx, key); err != nil {
		return fmt.Errorf("remove container %s: %w", key, err)
	}
	return nil
}

// view makes a view of a chain ID, hands it to use, and removes it.
func (n *node) view(ctx context.Context, top string, use func([]mount.Mount) error) (err error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	// The lease keeps the view from the garbage collection that a pull sets off.
	ctx, release, err := n.client.WithLease(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, release(ctx)) }()
	s := n.client.SnapshotService(n.snapshotter)
	key := fmt.Sprintf("view-%d", n.views.Add(1))
	mounts, err := s.View(ctx, key, top)
	if err != nil {
		return fmt.Errorf("view of %s: %w", top, err)
	}
	defer func() { err = errors.Join(err, s.Remove(ctx, key)) }()
	return use(mounts)
}

// create makes the snapshot of a container of an image as the CRI plugin does, which unpacks
// the image when its layers are not there (internal/cri/opts/container.go of containerd). It hands
// the mounts to use, and removes the snapshot.
func (n *node) create(ctx context.Context, ref string, use func([]mount.Mount) error) (err error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	ctx, release, err := n.client.WithLease(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, release(ctx)) }()
	image, err := n.client.GetImage(ctx, ref)
	if err != nil {
		return err
	}
	c := containers.Container{ID: fmt.Sprintf("created-%d", n.views.Add(1)), Snapshotter: n.snapshotter}
	prepare := client.WithNewSnapshot(c.ID, image)
	if err = prepare(ctx, n.client, &c); errdefs.IsNotFound(err) {
		if err = image.Unpack(ctx, n.snapshotter); err == nil {
			err = prepare(ctx, n.client, &c)
		}
	}
	if err != nil {
		return fmt.Errorf("create a container of %s: %w", ref, err)
	}
	s := n.client.SnapshotService(n.snapshotter)
	defer func() { err = errors.Join(err, s.Remove(ctx, c.ID)) }()
	mounts, err := s.Mounts(ctx, c.ID)
	if err != nil {
		return err
	}
	return use(mounts)
}

// chainID returns the chain ID at the end of a committed name of the daemon,
// which is namespace, number, and the name in containerd; it is empty for other
// names.
func chainID(name string) digest.Digest {
	if i := strings.LastIndex(name, "/sha256:"); i >= 0 {
		return digest.Digest(name[i+1:])
	}
	return ""
}

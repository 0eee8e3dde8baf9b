package repull

import (
	"context"
	"fmt"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	transferapi "github.com/containerd/containerd/api/services/transfer/v1"
	"github.com/containerd/containerd/api/types"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/internal/library"
)

// View is for package images, which reads and repairs whole images: containerd's services,
// in the namespace of the context of each call.
type View struct{ c *Containerd }

// View returns the view of a containerd.
func (c *Containerd) View() View { return View{c} }

// Content is containerd's content store.
func (v View) Content() content.Store { return v.c.content }

// Library reads images out of containerd's content store.
func (v View) Library() library.Store { return v.c.lib }

// Transfers is containerd's transfer service.
func (v View) Transfers() transferapi.TransferClient { return v.c.transfers }

// Leases are containerd's leases.
func (v View) Leases() leases.Manager { return v.c.leases }

// Apply extracts a blob into mounts, by containerd's diff service, and returns the digest of
// what it held.
func (v View) Apply(ctx context.Context, blob ocispec.Descriptor, mounts []mount.Mount) (digest.Digest, error) {
	r, err := v.c.differ.Apply(ctx, &diffapi.ApplyRequest{
		Diff:   &types.Descriptor{MediaType: blob.MediaType, Digest: blob.Digest.String(), Size: blob.Size},
		Mounts: mount.ToProto(mounts),
	})
	if err != nil {
		return "", fmt.Errorf("extract blob %s: %w", blob.Digest, errgrpc.ToNative(err))
	}
	return digest.Digest(r.Applied.Digest), nil
}

// Snapshotter is containerd's view of one of its snapshotters.
func (v View) Snapshotter(name string) snapshots.Snapshotter {
	return v.c.snapshotter(Layer{Snapshotter: name})
}

// Namespaces lists containerd's namespaces.
func (v View) Namespaces(ctx context.Context) ([]string, error) { return v.c.listNamespaces(ctx) }

// ContentRoot is the directory of containerd's content store, as containerd reports it,
// "" when it does not.
func (v View) ContentRoot(ctx context.Context) (string, error) { return v.c.contentRoot(ctx) }

// Images lists the images of a namespace.
func (v View) Images(ctx context.Context) ([]*imagesapi.Image, error) {
	return v.c.listImages(ctx)
}

// DeleteImage deletes the name of an image while it is what it was when it was listed. One
// that was written meanwhile belongs to a pull: the error is Unavailable. It is NotFound
// when the name is gone.
func (v View) DeleteImage(ctx context.Context, i *imagesapi.Image) error {
	now, err := v.c.images.Get(ctx, &imagesapi.GetImageRequest{Name: i.Name})
	if err = errgrpc.ToNative(err); err == nil && !now.Image.UpdatedAt.AsTime().Equal(i.UpdatedAt.AsTime()) {
		return fmt.Errorf("image %s is being pulled: %w", i.Name, errdefs.ErrUnavailable)
	}
	if err == nil {
		_, err = v.c.images.Delete(ctx, &imagesapi.DeleteImageRequest{Name: i.Name, Target: i.Target})
		err = errgrpc.ToNative(err)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete image %s: %w", i.Name, err)
	}
	return err
}

// DeleteName deletes a name that the caller itself has made. One that is gone is no error.
func (v View) DeleteName(ctx context.Context, name string) error {
	_, err := v.c.images.Delete(ctx, &imagesapi.DeleteImageRequest{Name: name})
	if err = errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete image %s: %w", name, err)
	}
	return nil
}

// Tidy deletes a lease, also when ctx has ended. What cannot be deleted ends with its date.
func (v View) Tidy(ctx context.Context, lease leases.Lease) error { return v.c.tidy(ctx, lease) }

// Record returns what containerd has on record of a blob, and a context of a namespace that has
// it: that of l, or else any. The error is NotFound when none has.
func (v View) Record(ctx context.Context, l *library.Library, d digest.Digest) (context.Context, content.Info, error) {
	return v.c.record(ctx, l, d)
}

// Evidence returns nil when containerd itself shows that a layer cannot be healed, as [Containerd.Drop]
// requires it. l is the library of the layer's namespace, configured the content_root.
func (v View) Evidence(ctx context.Context, layer Layer, l *library.Library, configured string) error {
	root, err := v.c.contentRoot(ctx)
	if err != nil {
		return err
	}
	return v.c.evidence(ctx, layer, l, map[string]bool{layer.ChainID.String(): true}, root, configured)
}

// Container is a container of a snapshotter.
type Container struct {
	ID, Key string // Key is that of its snapshot
	Image   string // the name that it was created with
	text    string
}

func (c Container) String() string { return c.text }

// Containers lists the containers whose snapshots are in a snapshotter.
func (v View) Containers(ctx context.Context, snapshotter string) (all []Container, err error) {
	listed, err := v.c.listContainers(ctx, snapshotter)
	for _, l := range listed {
		all = append(all, Container{l.ID, l.SnapshotKey, l.Image, holder{l.SnapshotKey, l}.String()})
	}
	return all, err
}

// Exited reports whether a container has no process, as after its end and before its start.
// Each is queried by itself: containerd leaves those whose shim does not answer out of its
// list (plugins/services/tasks/local.go, addTasks), and they may run. The error shows
// nothing.
func (v View) Exited(ctx context.Context, container string) (bool, error) {
	r, err := v.c.tasks.Get(ctx, &tasksapi.GetRequest{ContainerID: container})
	if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("get the task of container %s: %w", container, err)
	}
	return r.Process.GetStatus() == tasktypes.Status_STOPPED, nil
}

// Planned is what a Drop would do.
type Planned struct {
	Images    []string // names that it would delete
	Snapshots []string // keys that it would remove, but for that of the layer
	Bad       []Blob   // blobs whose rows and files it would delete
	Holders   []string // what stands on the layer; nothing but bad blobs goes then
}

// Plan determines what Drop would do, and changes nothing. Its errors are those of Drop,
// but that a layer that is held is none.
func (v View) Plan(ctx context.Context, layer Layer, o Options) (Planned, error) {
	p, err := v.c.plan(ctx, layer, o)
	if err != nil {
		return Planned{}, fmt.Errorf("drop %v: %w", layer, err)
	}
	planned := Planned{Snapshots: p.above, Bad: p.bad}
	for _, i := range p.images {
		planned.Images = append(planned.Images, i.Name)
	}
	for _, h := range p.holders {
		planned.Holders = append(planned.Holders, h.String())
	}
	return planned, nil
}

// DropBlobs deletes the rows of bad blobs in every namespace, and waits until the files are
// deleted, so that the next pull or fetch brings them. Each is read again before; those that
// are good by then stay. The blobs that it returns were bad.
func (v View) DropBlobs(ctx context.Context, layer Layer, bad []Blob) ([]Blob, error) {
	ctx, cancel := context.WithCancel(ctx) // ends the streams of content writers
	defer cancel()
	root, err := v.c.contentRoot(ctx)
	if err != nil {
		return nil, err
	}
	d := drop{c: v.c, layer: layer, plan: &plan{bad: bad, contentRoot: root}}
	err = d.dropBlobs(ctx)
	return d.done.Blobs, err
}

package repull

import (
	"context"
	"fmt"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	transferapi "github.com/containerd/containerd/api/services/transfer/v1"
	"github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/diff"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/leases"
	leasesproxy "github.com/containerd/containerd/v2/core/leases/proxy"
	"github.com/containerd/containerd/v2/core/snapshots"
	snapshotsproxy "github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/durable-snapshotter/durable-snapshotter/internal/library"
)

// patient is how a connection is tried again: often, because it is a socket of this
// machine, and what containerd must be notified of is due when it returns.
var patient = func() backoff.Config {
	b := backoff.DefaultConfig
	b.BaseDelay, b.MaxDelay = 200*time.Millisecond, time.Second
	return b
}()

// connectWithin is how long one attempt may take. Without it, grpc gives up after the pause
// that would follow, and a containerd on a busy machine seems to be down. Where none listens
// an attempt fails at once.
const connectWithin = 20 * time.Second

// Containerd is a connection to a containerd. It uses the services themselves and
// not containerd's client, which brings a registry client along.
type Containerd struct {
	conn       *grpc.ClientConn
	images     imagesapi.ImagesClient
	containers containersapi.ContainersClient
	namespaces namespacesapi.NamespacesClient
	snapshots  snapshotsapi.SnapshotsClient
	content    content.Store
	lib        library.Store // reads from content
	leases     leases.Manager
	inspect    introspectionapi.IntrospectionClient
	tasks      tasksapi.TasksClient
	differ     diffapi.DiffClient
	transfers  transferapi.TransferClient
	events     eventsapi.EventsClient
}

// Connect makes a connection to the unix socket of a containerd. It connects when
// it is used first, so a containerd that does not run is no error here.
func Connect(address string, more ...grpc.DialOption) (*Containerd, error) {
	opts := append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// grpc's own pauses grow to two minutes while a containerd is down.
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: patient, MinConnectTimeout: connectWithin}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize), grpc.MaxCallSendMsgSize(defaults.DefaultMaxSendMsgSize)),
	}, more...)
	conn, err := grpc.NewClient("unix://"+address, opts...)
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", address, err)
	}
	store := contentproxy.NewContentStore(conn)
	return &Containerd{
		conn:       conn,
		images:     imagesapi.NewImagesClient(conn),
		containers: containersapi.NewContainersClient(conn),
		namespaces: namespacesapi.NewNamespacesClient(conn),
		snapshots:  snapshotsapi.NewSnapshotsClient(conn),
		content:    store,
		lib:        library.NewStore(store),
		leases:     leasesproxy.NewLeaseManager(leasesapi.NewLeasesClient(conn)),
		inspect:    introspectionapi.NewIntrospectionClient(conn),
		tasks:      tasksapi.NewTasksClient(conn),
		differ:     diffapi.NewDiffClient(conn),
		transfers:  transferapi.NewTransferClient(conn),
		events:     eventsapi.NewEventsClient(conn),
	}, nil
}

// Close ends the connection.
func (c *Containerd) Close() error { return c.conn.Close() }

// Applier is its diff service.
func (c *Containerd) Applier() diff.Applier { return diffproxy.NewDiffApplier(c.differ).(diff.Applier) }

// Content is its content store.
func (c *Containerd) Content() content.Provider { return c.content }

// Watch keeps the connection up until ctx ends, and calls changed whenever that has an effect:
// with true at first, and when containerd has returned; with false when it cannot be reached.
func (c *Containerd) Watch(ctx context.Context, changed func(connected bool)) {
	for {
		state := c.conn.GetState()
		switch state {
		case connectivity.Idle: // also after a connection was lost
			changed(false)
			c.conn.Connect()
		case connectivity.TransientFailure:
			changed(false)
		case connectivity.Ready:
			changed(true)
		}
		if !c.conn.WaitForStateChange(ctx, state) {
			return
		}
	}
}

// WatchImages calls created for each name of an image that is written in any namespace, until ctx
// ends. It may miss some while the connection is down.
func (c *Containerd) WatchImages(ctx context.Context, created func()) {
	for ctx.Err() == nil {
		stream, err := c.events.Subscribe(ctx, &eventsapi.SubscribeRequest{Filters: []string{`topic=="/images/create"`}}, grpc.WaitForReady(true))
		for err == nil {
			if _, err = stream.Recv(); err == nil {
				created()
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// Layer is a committed snapshot, as containerd knows it.
type Layer struct {
	Namespace   string // of containerd; k8s.io is that of the CRI plugin
	Snapshotter string // name of the proxy plugin in containerd's configuration
	ChainID     digest.Digest
}

func (l Layer) String() string { return fmt.Sprintf("%s in namespace %s", l.ChainID, l.Namespace) }

// snapshotter is containerd's view of the layer's snapshotter.
func (c *Containerd) snapshotter(l Layer) snapshots.Snapshotter {
	return snapshotsproxy.NewSnapshotter(c.snapshots, l.Snapshotter)
}

func (c *Containerd) listImages(ctx context.Context) ([]*imagesapi.Image, error) {
	r, err := c.images.List(ctx, &imagesapi.ListImagesRequest{})
	if err != nil {
		return nil, fmt.Errorf("list images: %w", errgrpc.ToNative(err))
	}
	return r.Images, nil
}

func (c *Containerd) listContainers(ctx context.Context, snapshotter string) ([]*containersapi.Container, error) {
	r, err := c.containers.List(ctx, &containersapi.ListContainersRequest{})
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", errgrpc.ToNative(err))
	}
	var ours []*containersapi.Container
	for _, container := range r.Containers {
		if container.Snapshotter == snapshotter {
			ours = append(ours, container)
		}
	}
	return ours, nil
}

func (c *Containerd) listNamespaces(ctx context.Context) ([]string, error) {
	r, err := c.namespaces.List(ctx, &namespacesapi.ListNamespacesRequest{})
	if err != nil {
		return nil, fmt.Errorf("list namespaces: %w", errgrpc.ToNative(err))
	}
	var names []string
	for _, ns := range r.Namespaces {
		names = append(names, ns.Name)
	}
	return names, nil
}

// contentRoot is the directory of containerd's content store, as containerd reports it,
// "" when it does not.
func (c *Containerd) contentRoot(ctx context.Context) (string, error) {
	r, err := c.inspect.Plugins(ctx, &introspectionapi.PluginsRequest{Filters: []string{"type==" + contentPlugin}})
	if err != nil {
		return "", fmt.Errorf("get the content store of containerd: %w", errgrpc.ToNative(err))
	}
	for _, p := range r.Plugins {
		if p.ID == "content" {
			return p.Exports["root"], nil
		}
	}
	return "", nil
}

// contentPlugin is the type of containerd's content store among its plugins.
const contentPlugin = "io.containerd.content.v1"

package kit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
)

// ContentDir is where containerd keeps blobs, relative to its Dir.
const ContentDir = "root/io.containerd.content.v1.content"

// ctrLimit is enough for the slowest pull: a hang shows as the call that hangs,
// not as a time-out of the whole run.
const ctrLimit = 3 * time.Minute

// NodeOptions describe a node.
type NodeOptions struct {
	Binaries   Binaries          // of containerd, and of the daemon unless Daemon names another
	Dir        string            // scratch directory with a short name: the disk's file, sockets, configurations, logs
	Disk       DiskOptions       // of the disk that the node makes for itself
	Volume     string            // a mounted directory in place of that disk
	BuiltIn    bool              // no daemon: containerd has its built-in overlayfs only
	Registry   *Registry         // only this node uses it; the node closes it
	Daemon     DaemonOptions     // Binary, Dir and RunDir have defaults
	Containerd ContainerdOptions // Binaries, Dir, RunDir and Daemon have defaults

	Heals       bool   // the daemon knows containerd's content store
	ContentRoot string // with Heals: a directory of the disk that it takes for that store
	Notifies    bool   // the daemon knows containerd's socket
}

// Node is what a node of a cluster has below its kubelet: a disk, the daemon, and
// containerd, with its CRI plugin if it has CRIOptions. Nothing runs after
// [NewNode]; [Node.Start] starts everything, and the parts can be stopped, killed
// and started again one by one.
type Node struct {
	Disk       *Disk       // nil on a volume
	Daemon     *Daemon     // nil with BuiltIn
	Containerd *Containerd // nil before its first start
	CRI        *CRI        // nil without the plugin, and before containerd's first start
	Registry   *Registry   // nil when the node is offline
	Number     int64       // another one for each node of the process: names of containers name cgroups, which all nodes share

	opts NodeOptions
}

var nodes atomic.Int64

// NewNode makes the disk, the directories and the daemon's configuration.
func NewNode(o NodeOptions) (_ *Node, err error) {
	n := &Node{Registry: o.Registry, Number: nodes.Add(1), opts: o}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	if o.Volume == "" {
		if n.Disk, err = NewDisk(filepath.Join(o.Dir, "disk"), o.Disk); err != nil {
			return nil, err
		}
	}
	c := &n.opts.Containerd
	c.Dir, c.RunDir = cmp.Or(c.Dir, n.Path("containerd")), cmp.Or(c.RunDir, filepath.Join(o.Dir, "cd"))
	if c.Binaries.Containerd == "" {
		c.Binaries = o.Binaries
	}
	if o.BuiltIn {
		return n, nil
	}
	d := o.Daemon
	d.Binary = cmp.Or(d.Binary, o.Binaries.Daemon)
	d.Dir, d.RunDir = cmp.Or(d.Dir, n.Path("durable")), cmp.Or(d.RunDir, filepath.Join(o.Dir, "ds"))
	if o.Heals {
		d.ContentRoot = n.ContentRoot()
	}
	if o.Heals && o.ContentRoot != "" {
		d.ContentRoot = n.Path(o.ContentRoot)
	}
	if o.Notifies {
		d.Containerd = n.Socket()
	}
	if n.Daemon, err = NewDaemon(d); err != nil {
		return nil, err
	}
	if c.Daemon == nil {
		c.Daemon = n.Daemon
	}
	return n, nil
}

// Through makes containerd reach the daemon at another address, where something
// stands between the two. It has an effect until containerd's first start.
func (n *Node) Through(address string) {
	n.opts.Containerd.Daemon = &Daemon{Root: n.Daemon.Root, Address: address}
}

// Path is a path on the disk or the volume.
func (n *Node) Path(elem ...string) string {
	if n.Disk != nil {
		return n.Disk.Path(elem...)
	}
	return filepath.Join(append([]string{n.opts.Volume}, elem...)...)
}

// ContentRoot is the directory of containerd's content store.
func (n *Node) ContentRoot() string { return filepath.Join(n.opts.Containerd.Dir, ContentDir) }

// Socket is containerd's, before its first start, too.
func (n *Node) Socket() string { return filepath.Join(n.opts.Containerd.RunDir, "containerd.sock") }

// Blob is the file in which containerd keeps a blob.
func (n *Node) Blob(d digest.Digest) string {
	return filepath.Join(n.ContentRoot(), "blobs", d.Algorithm().String(), d.Encoded())
}

// Start starts the daemon, if there is one, and then containerd.
func (n *Node) Start(ctx context.Context) error {
	if n.Daemon != nil {
		if err := n.Daemon.Start(ctx); err != nil {
			return err
		}
	}
	return n.StartContainerd(ctx)
}

// StartContainerd starts containerd, again after it was stopped or killed, and
// returns when its CRI plugin, if there is one, serves.
func (n *Node) StartContainerd(ctx context.Context) (err error) {
	if n.Containerd == nil {
		n.Containerd, err = StartContainerd(ctx, n.opts.Containerd)
	} else {
		err = n.Containerd.Start(ctx)
	}
	if err != nil || n.opts.Containerd.CRI == nil {
		return err
	}
	if n.CRI == nil {
		if n.CRI, err = DialCRI(n.Containerd); err != nil {
			return err
		}
	}
	return n.CRI.Redial(ctx)
}

// GoOffline closes the registry. Doing it twice is no error.
func (n *Node) GoOffline() error {
	r := n.Registry
	if n.Registry = nil; r == nil {
		return nil
	}
	return r.Close()
}

// Push builds an image and pushes it to the node's registry.
func (n *Node) Push(ctx context.Context, name string, img Image) (Pushed, error) {
	return Push(ctx, n.Registry, name, img)
}

// Namespace is where Ctr and Client work: the CRI plugin's, if there is one.
func (n *Node) Namespace() string {
	if n.opts.Containerd.CRI != nil {
		return CRINamespace
	}
	return n.Containerd.Namespace
}

// Ctr runs ctr and returns its standard output. It is cut short after three
// minutes.
func (n *Node) Ctr(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, ctrLimit)
	defer cancel()
	return n.Containerd.Ctr(ctx, append([]string{"--namespace", n.Namespace()}, args...)...)
}

// Client connects a client of containerd to the node's namespace, which the
// context that it returns names, too. The caller closes the client.
func (n *Node) Client(ctx context.Context) (context.Context, *client.Client, error) {
	cl, err := client.New(n.Containerd.Address, client.WithDefaultNamespace(n.Namespace()), client.WithTimeout(30*time.Second))
	if err != nil {
		return nil, nil, fmt.Errorf("connect to containerd: %w", err)
	}
	return namespaces.WithNamespace(ctx, n.Namespace()), cl, nil
}

// Kill ends containerd and the daemon as a power cut does. What does not run is
// left alone.
func (n *Node) Kill() error {
	var errs []error
	if n.Containerd != nil && n.Containerd.Process != nil {
		errs = append(errs, n.Containerd.Kill())
	}
	if n.Daemon != nil && n.Daemon.Process != nil {
		errs = append(errs, n.Daemon.Kill())
	}
	return errors.Join(errs...)
}

// Close kills what runs, closes all connections and the registry, and gives the
// disk back. A disk that cannot be unmounted, because something was left behind,
// is an error.
func (n *Node) Close() error {
	var errs []error
	if n.CRI != nil {
		errs = append(errs, n.CRI.Close())
		n.CRI = nil
	}
	errs = append(errs, n.Kill(), n.GoOffline())
	if n.Disk != nil {
		errs = append(errs, n.Disk.Close())
		n.Disk = nil
	}
	return errors.Join(errs...)
}

package storm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// The names by which containerd knows its snapshotters.
const (
	durable   = "durable"
	overlayfs = "overlayfs"
)

// The namespaces of the storm, and one for what stands all the time.
const (
	plain    = "default"
	k8s      = kit.CRINamespace
	standing = "standing"
)

// parallel is how many layers are unpacked at a time where that is more than one.
const parallel = 3

// node is a node with the CRI plugin, and clients that are made anew with each start
// of containerd.
type node struct {
	*kit.Node
	fs      string // kind of file system
	unpacks int

	// onDisk is held for reading by what has files of the disk open in this
	// process, so that a power cut can unmount it.
	onDisk sync.RWMutex

	mu     sync.RWMutex // guards what follows
	puller *kit.Puller  // another one after each start of containerd
	stood  int          // snapshots that stand has made
	pods   []*pod       // that no actor is at work on
	ended  int          // how often all containers were ended from outside
}

// newNode starts a node on a new disk below dir, where its sources are made, too. pause is the
// reference of the image of all sandboxes.
func newNode(ctx context.Context, dir, fs string, bin kit.Binaries, unpacks int, pause string) (_ *node, err error) {
	n := &node{fs: fs, unpacks: unpacks}
	n.Node, err = kit.NewNode(kit.NodeOptions{
		Binaries: bin, Dir: dir, Disk: kit.DiskOptions{FS: fs}, BuiltIn: *snapshotter != durable, Heals: true, Notifies: true,
		Daemon: kit.DaemonOptions{Config: sourcesConfig(dir)},
		Containerd: kit.ContainerdOptions{
			Unpacks: unpacks, CRI: &kit.CRIOptions{Pause: pause, Snapshotter: *snapshotter},
		},
	})
	if err != nil {
		return nil, err
	}
	for _, step := range []func(context.Context) error{n.Start, n.connect, n.stand} {
		if err := step(ctx); err != nil {
			return nil, errors.Join(err, n.close())
		}
	}
	return n, nil
}

// connect makes new connections to containerd: those from before its start would
// wait out their backoff. It returns when the CRI plugin serves.
func (n *node) connect(ctx context.Context) error {
	n.mu.Lock()
	old := n.puller
	n.mu.Unlock()
	p := &kit.Puller{Snapshotter: *snapshotter, Unpacks: n.unpacks}
	var err error
	if p.Client, err = client.New(n.Containerd.Address, client.WithTimeout(30*time.Second)); err != nil {
		return err
	}
	if p.CRI, err = kit.DialCRI(n.Containerd); err != nil {
		return err
	}
	if err := p.CRI.Redial(ctx); err != nil {
		return err
	}
	n.mu.Lock()
	n.puller = p
	n.mu.Unlock()
	if old != nil {
		return errors.Join(old.Client.Close(), old.CRI.Close())
	}
	return nil
}

func (n *node) pull(ctx context.Context, way kit.Way, namespace, ref string) error {
	return n.get().Pull(ctx, way, namespace, ref)
}

func (n *node) get() *kit.Puller {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.puller
}

func (n *node) client() *client.Client { return n.get().Client }

func (n *node) snapshotter() snapshots.Snapshotter { return n.client().SnapshotService(*snapshotter) }

// stand makes the snapshot that reached needs. Its key is another one each time:
// where containerd's records were lost, the daemon has the old one still, and a
// snapshotter refuses a Prepare of a key that it has.
func (n *node) stand(ctx context.Context) error {
	n.mu.Lock()
	n.stood++
	n.mu.Unlock()
	ctx = namespaces.WithNamespace(ctx, standing)
	_, err := n.snapshotter().Prepare(ctx, n.standingKey(), "", snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "the storm"}))
	return err
}

func (n *node) standingKey() string {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return fmt.Sprint("standing-", n.stood)
}

// reached waits until containerd gets answers from the daemon again: its connection
// may wait for up to three seconds after a start of the daemon (grpc's backoff,
// cmd/containerd/server/server.go:402 of containerd 2.4.2).
func (n *node) reached(ctx context.Context) error {
	in := namespaces.WithNamespace(ctx, standing)
	return n.Containerd.WaitReady(ctx, 30*time.Second, func(context.Context) error {
		ctx, cancel := context.WithTimeout(in, 5*time.Second)
		defer cancel()
		_, err := n.snapshotter().Mounts(ctx, n.standingKey())
		if errdefs.IsNotFound(err) {
			err = n.stand(ctx)
		}
		return err
	})
}

// startContainerd starts containerd and returns when all of it serves.
func (n *node) startContainerd(ctx context.Context) error {
	if err := n.Containerd.Start(ctx); err != nil {
		return err
	}
	return n.connect(ctx)
}

// cut cuts the power. btrfs cannot be shut down: there, it is another boot after a
// kill, which has lost nothing.
func (n *node) cut(ctx context.Context) error {
	n.onDisk.Lock()
	defer n.onDisk.Unlock()
	n.countEnd()
	if err := errors.Join(n.CutPower(), n.start(ctx)); err != nil {
		return err
	}
	return n.startContainerd(ctx)
}

// endContainers kills all containers, while containerd does not run.
func (n *node) endContainers() error {
	n.countEnd()
	return n.Containerd.KillContainers()
}

// kill kills the daemon, if there is one.
func (n *node) kill() error {
	if n.Daemon == nil {
		return nil
	}
	return n.Daemon.Kill()
}

// start starts the daemon, if there is one.
func (n *node) start(ctx context.Context) error {
	if n.Daemon == nil {
		return nil
	}
	return n.Daemon.Start(ctx)
}

// verb runs the daemon's program, and returns what it printed and its exit status.
func (n *node) verb(ctx context.Context, args ...string) (string, int, error) {
	out, stderr, status, err := n.Daemon.Verb(ctx, args...)
	if status != 0 {
		out += stderr
	}
	return out, status, err
}

// close closes the clients, kills everything and gives the disk back.
func (n *node) close() error {
	var errs []error
	if p := n.get(); p != nil {
		errs = append(errs, p.Client.Close(), p.CRI.Close())
	}
	// After a storm that has found something, containers may hold the disk.
	errs = append(errs, n.Kill())
	if n.Containerd != nil {
		errs = append(errs, n.endContainers())
	}
	return errors.Join(append(errs, n.Close())...)
}

// logs are the files that record what happened.
func (n *node) logs() []string {
	files := []string{n.Containerd.LogPath()}
	if n.Daemon != nil {
		files = append(files, n.Daemon.LogPath())
	}
	return files
}

// directories lists what the daemon has in its directories of layers.
func (n *node) directories() (names []string, err error) {
	for _, dir := range []string{"snapshots", "removing", "replaced", "healing"} {
		entries, rerr := os.ReadDir(filepath.Join(n.Daemon.Root, dir))
		if rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
		for _, e := range entries {
			names = append(names, dir+"/"+e.Name())
		}
	}
	return names, err
}

package noharm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

type snapshotter = snapshots.Snapshotter

// volume is a mounted file system.
type volume struct{ fs, device, dir string }

func (v volume) mount(t testing.TB, options ...string) {
	t.Helper()
	command(t, "mount", "-t", v.fs, "-o", strings.Join(append([]string{"defaults"}, options...), ","), v.device, v.dir)
}

func (v volume) unmount(t testing.TB) {
	t.Helper()
	check(t, kit.UnmountBelow(v.dir))
	check(t, kit.WaitReleased(v.device, time.Minute))
}

// node is a node in use, with its CRI plugin, one image, a container on it, and no
// registry any more.
type node struct {
	*kit.Node
	volume
	blobs      bool     // the blobs of the layers were kept
	env        []string // of the daemon
	run        string   // the daemon's socket, configuration and log: not on the disk
	image      kit.Pushed
	down       bool // containerd is to stay down
	witness    *container
	containers int

	ids      []uint64          // directory numbers of the layers, base first
	names    []string          // the daemon's names of the layers
	inodes   map[string]uint64 // of the layers' directories
	content  []string          // digests of the blobs there are
	mark     int               // length of the daemon's log when the present cycle began
	deep     bool              // depth of the scrub in the present configuration
	interval string            // of the scrub
}

// nodeOptions are what is not usual about a node.
type nodeOptions struct {
	blobs  bool
	online bool     // the registry stays
	binary string   // the daemon; that of the tree when empty
	env    []string // further variables of the daemon
	many   int      // further layers of the image
}

// newNode makes a node on a disk of its own.
func newNode(t testing.TB, fs string, o nodeOptions) *node {
	t.Helper()
	disk := kittest.NewDisk(t, kit.DiskOptions{FS: fs})
	return newNodeOn(t, volume{fs: fs, device: disk.Device(), dir: disk.Path()}, o)
}

func newNodeOn(t testing.TB, v volume, o nodeOptions) *node {
	t.Helper()
	n := &node{volume: v, blobs: o.blobs, env: o.env, run: scratch(t), deep: true, interval: "2s"}
	b := must[built](t)(image())
	if o.many > 0 {
		b = must[built](t)(imageOfMany(o.many))
	}
	k := kit.NodeOptions{
		Volume: v.dir, Registry: must[*kit.Registry](t)(kit.StartRegistry(b.dir)),
		Daemon: kit.DaemonOptions{
			Binary: o.binary, RunDir: n.run, Config: " ", VerbEnv: append([]string{"PATH=" + n.searchPath()}, o.env...),
			Wrapper: []string{"/bin/sh", "-c", wrapper, n.envFile()},
		},
	}
	n.image = b.image
	n.image.Ref = k.Registry.Ref(strings.SplitN(strings.SplitN(b.image.Ref, "/", 2)[1], ":", 2)[0])
	k.Containerd.CRI = &kit.CRIOptions{Pause: n.image.Ref}
	if !o.blobs {
		k.Containerd.CRI.Images = "discard_unpacked_layers = true"
	}
	n.Node = kittest.NewNode(t, k)
	t.Cleanup(func() { n.end(t) })

	check(t, os.Mkdir(n.binDir(), 0o755))
	check(t, os.WriteFile(filepath.Join(n.binDir(), "unpigz"), fmt.Appendf(nil, unpigz, n.killSwitch()), 0o755))
	n.configure(t, n.ContentRoot())
	n.setEnv(t)
	check(t, n.Start(t.Context()))
	n.pull(t)
	if !o.online {
		check(t, n.GoOffline())
	}
	return n
}

// wrapper starts the daemon with the environment of a file, as another program
// when that names one. unpigz is what containerd's libraries decompress gzip with
// when it is installed; it dies while the file exists.
const (
	wrapper = `. "$0"; program=$1; shift; exec "${DAEMON:-$program}" "$@"`
	unpigz  = "#!/bin/sh\n[ -e %q ] && kill -9 $$\nexec gzip -dc\n"
)

func (n *node) envFile() string    { return filepath.Join(n.run, "env") }
func (n *node) binDir() string     { return filepath.Join(n.run, "bin") }
func (n *node) killSwitch() string { return filepath.Join(n.run, "kill-unpigz") }
func (n *node) searchPath() string { return n.binDir() + ":" + os.Getenv("PATH") }
func (n *node) configPath() string { return filepath.Join(n.run, "config.toml") }

// setEnv changes the environment of the daemon, from its next start on.
func (n *node) setEnv(t testing.TB, env ...string) {
	t.Helper()
	var b strings.Builder
	for _, e := range slices.Concat([]string{"PATH=" + n.searchPath()}, n.env, env) {
		fmt.Fprintf(&b, "export '%s'\n", e)
	}
	check(t, os.WriteFile(n.envFile(), []byte(b.String()), 0o644))
}

// configure writes the daemon's configuration, for its next start.
func (n *node) configure(t testing.TB, contentRoot string) {
	t.Helper()
	depth := map[bool]string{false: "metadata", true: "content"}[n.deep]
	check(t, os.WriteFile(n.configPath(), fmt.Appendf(nil,
		"content_root = '%s'\n[scrub]\ninterval = '%s'\ndepth = '%s'\nrate = 0\n[containerd]\naddress = '%s'\ndrop_images = true\n[heal]\nregistry = false\n",
		contentRoot, n.interval, depth, n.Socket()), 0o644))
}

// pull pulls the image through the CRI plugin and learns what there is then.
func (n *node) pull(t testing.TB) {
	t.Helper()
	check(t, n.CRI.Pull(t.Context(), n.image.Ref))
	n.learn(t)
	if !n.blobs {
		n.waitDiscarded(t)
		n.waitDigested(t)
	}
	// Of the image only: the daemon's collection after its start makes a blob for a moment.
	var m ocispec.Manifest
	check(t, json.Unmarshal(must[[]byte](t)(os.ReadFile(n.Blob(n.image.Manifest))), &m))
	own := map[string]bool{n.image.Manifest.String(): true, m.Config.Digest.String(): true}
	for _, l := range m.Layers {
		own[l.Digest.String()] = true
	}
	n.content = slices.DeleteFunc(n.blobsOf(t), func(d string) bool { return !own[d] })
	if want := 2 + len(m.Layers); n.blobs && len(n.content) != want {
		t.Fatalf("after the pull there are %d blobs of the image, want %d", len(n.content), want)
	}
}

// learn finds the directories of the layers.
func (n *node) learn(t testing.TB) {
	t.Helper()
	r := must[kit.Report](t)(n.Daemon.Inspect(t.Context()))
	n.ids, n.names = nil, nil
	for _, chainID := range n.image.ChainIDs {
		var last uint64
		name := ""
		for _, e := range r.Journal.Committed {
			if e.ChainID == chainID.String() && e.ID > last {
				last, name = e.ID, e.Name
			}
		}
		if name == "" {
			t.Fatalf("no snapshot of %s in %+v", chainID, r.Journal.Committed)
		}
		n.ids, n.names = append(n.ids, last), append(n.names, name)
	}
	n.inodes = must[map[string]uint64](t)(n.directories())
}

// directories returns the inodes of the layers' directories.
func (n *node) directories() (map[string]uint64, error) {
	all := map[string]uint64{}
	for _, id := range n.ids {
		for _, dir := range []string{n.snapshot(id), n.tree(id)} {
			var st unix.Stat_t
			if err := unix.Lstat(dir, &st); err != nil {
				return nil, &os.PathError{Op: "lstat", Path: dir, Err: err}
			}
			all[dir] = st.Ino
		}
	}
	return all, nil
}

func (n *node) snapshot(id uint64) string { return n.Daemon.SnapshotDir(id) }
func (n *node) tree(id uint64) string     { return n.Daemon.LayerDir(id) }

// layer is a path in the tree of layer i.
func (n *node) layer(i int, elem ...string) string {
	return filepath.Join(append([]string{n.tree(n.ids[i])}, elem...)...)
}

// waitDiscarded waits until containerd has collected the blobs of the layers.
func (n *node) waitDiscarded(t testing.TB) {
	t.Helper()
	waitFor(t, time.Minute, func() error {
		// A collection while the image was pulled may have been the last for long.
		n.ctr(t, "leases", "create", "--id", "collect")
		n.ctr(t, "leases", "delete", "--sync", "collect")
		blobs := n.blobsOf(t)
		for _, l := range n.image.Layers {
			if slices.Contains(blobs, l.Digest.String()) {
				return fmt.Errorf("the blob %s of a layer is still there", l.Digest)
			}
		}
		return nil
	})
}

// waitDigested waits until content can be compared without blobs. The daemon
// searches for new layers every 15 seconds.
func (n *node) waitDigested(t testing.TB) {
	t.Helper()
	waitFor(t, 3*time.Minute, func() error {
		all, err := n.results(t, "check", "--cached")
		for _, r := range all {
			if r.Contents == "" {
				return fmt.Errorf("%v has no content digests yet", r)
			}
		}
		return err
	})
}

// blobsOf lists the content store of the CRI's namespace.
func (n *node) blobsOf(t testing.TB) []string {
	t.Helper()
	return slices.Sorted(strings.SplitSeq(strings.TrimSpace(n.ctr(t, "content", "ls", "-q")), "\n"))
}

func (n *node) ctr(t testing.TB, args ...string) string {
	t.Helper()
	return kittest.Ctr(t, n.Node, args...)
}

// stat calls Stat of containerd for each layer, which calls the daemon. Clients do so
// before they use an image. After a restart of the daemon, containerd's next attempt
// to connect may be a second away.
func (n *node) stat(t testing.TB) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ctx, cl, err := n.Client(ctx)
	if err != nil {
		return err
	}
	defer cl.Close()
	for _, id := range n.image.ChainIDs {
		_, err := cl.SnapshotService("durable").Stat(ctx, id.String())
		for until := time.Now().Add(10 * time.Second); err != nil && strings.Contains(err.Error(), "connection error") && time.Now().Before(until); {
			time.Sleep(100 * time.Millisecond)
			_, err = cl.SnapshotService("durable").Stat(ctx, id.String())
		}
		if err != nil {
			return fmt.Errorf("stat %s: %w", id, err)
		}
	}
	return nil
}

// statAll calls Stat of the daemon itself for each layer over sn, and returns the errors.
func (n *node) statAll(t testing.TB, sn snapshots.Snapshotter) error {
	t.Helper()
	var all []error
	for _, name := range n.names {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		_, err := sn.Stat(ctx, name)
		cancel()
		all = append(all, err)
	}
	return errors.Join(all...)
}

// listed is an error unless containerd and its CRI plugin have the image.
func (n *node) listed(t testing.TB) error {
	t.Helper()
	out, err := n.Ctr(t.Context(), "images", "ls", "-q")
	if err != nil {
		return err
	}
	if !slices.Contains(strings.Split(out, "\n"), n.image.Ref) {
		return fmt.Errorf("ctr images ls does not list %s: %q", n.image.Ref, out)
	}
	return n.CRI.WaitKnown(t.Context(), n.image.Ref, true)
}

// halt ends daemon and containerd as a power cut does; containers go on.
func (n *node) halt(t testing.TB) {
	t.Helper()
	check(t, n.Kill())
}

// boot starts both, on a machine that was not shut down. It verifies at the other
// depth than before.
func (n *node) boot(t testing.TB) {
	t.Helper()
	check(t, kit.NewBoot())
	n.deep = !n.deep
	n.configure(t, n.ContentRoot())
	check(t, n.Daemon.Start(t.Context()))
	if !n.down {
		check(t, n.StartContainerd(t.Context()))
	}
}

// daemonLog is what the daemon has logged since the present cycle began.
func (n *node) daemonLog(t testing.TB) string {
	t.Helper()
	b := must[[]byte](t)(os.ReadFile(n.Daemon.LogPath()))
	return string(b[min(n.mark, len(b)):])
}

// end stops everything, whatever has become of it.
func (n *node) end(t testing.TB) {
	if t.Failed() {
		t.Log(n.Daemon.LogTail(2000))
	}
	if n.Containerd != nil && n.Containerd.Running() && n.witness != nil {
		if _, err := n.Ctr(context.Background(), "task", "rm", "--force", n.witness.name); err != nil {
			t.Error(err)
		}
	}
	check(t, n.Close())
}

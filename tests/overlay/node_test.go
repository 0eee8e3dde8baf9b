package overlay

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff/apply"
	containerdimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/unpack"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	stock "github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// node is the part of a containerd that unpacks images: its content store, its
// metadata database, its applier and unpacker, its built-in overlay
// snapshotter, and the proxy client of the daemon under test. All of it is
// containerd's own code, in this process.
type node struct {
	daemon *kit.Daemon
	db     *metadata.DB
	count  int
	pause  time.Duration // of the applier in the middle of each layer
}

// The snapshotters of a node. "renamed" is the built-in one under another name,
// as a snapshotter that wraps it would be.
const (
	durable   = "durable"
	overlayfs = "overlayfs"
	renamed   = "renamed"
)

// newNode makes a node whose snapshotters lie on a disk of their own.
func newNode(t testing.TB, fs, config string) *node {
	t.Helper()
	return newNodeIn(t, newDisk(t, fs).Path(), "", config)
}

func newNodeIn(t testing.TB, dir, binary, config string) *node {
	t.Helper()
	own := scratch(t)
	store := filepath.Join(own, "content")
	n := &node{daemon: startDaemon(t, binary, filepath.Join(dir, "durable"), fmt.Sprintf("content_root = '%s'\n%s", store, config))}
	all := map[string]snapshots.Snapshotter{durable: must[snapshots.Snapshotter](t)(n.daemon.Snapshotter())}
	for _, name := range []string{overlayfs, renamed} {
		all[name] = must[snapshots.Snapshotter](t)(stock.NewSnapshotter(filepath.Join(dir, name)))
	}
	cs := must[content.Store](t)(local.NewStore(store))
	db := must[*bolt.DB](t)(bolt.Open(filepath.Join(own, "meta.db"), 0o600, nil))
	n.db = metadata.NewDB(db, cs, all)
	check(t, n.db.Init(t.Context()))
	t.Cleanup(func() {
		for _, sn := range all {
			if err := sn.Close(); err != nil {
				t.Error(err)
			}
		}
		if err := errors.Join(n.db.Close(), db.Close()); err != nil {
			t.Error(err)
		}
	})
	return n
}

// limiter is containerd's semaphore for concurrent unpacks.
type limiter chan struct{}

func (l limiter) Acquire(ctx context.Context, _ int64) error {
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l limiter) Release(int64) { <-l }

// unpacking is one image unpacked into one snapshotter, in a namespace of its
// own, so that nothing is there already.
type unpacking struct {
	ctx   context.Context
	sn    snapshots.Snapshotter
	chain []digest.Digest
}

// unpack unpacks an image as containerd's transfer service and its CRI plugin
// do. Limit is max_concurrent_unpacks; with 0 it is sequential.
func (n *node) unpack(ctx context.Context, img image, snapshotter string, limit int) (*unpacking, error) {
	n.count++
	ctx = namespaces.WithNamespace(ctx, fmt.Sprintf("n%d", n.count))
	manifest, diffIDs, err := n.store(ctx, img)
	if err != nil {
		return nil, err
	}
	cs := n.db.ContentStore()
	p := unpack.Platform{
		SnapshotterKey: snapshotter, Snapshotter: n.db.Snapshotter(snapshotter),
		Applier: apply.NewFileSystemApplier(pausing{cs, n.pause}), SnapshotterCapabilities: []string{snapshots.RebaseCap},
	}
	opts := []unpack.UnpackerOpt{unpack.WithUnpackPlatform(p)}
	if limit > 0 {
		opts = append(opts, unpack.WithUnpackLimiter(make(limiter, limit)))
	}
	u, err := unpack.NewUnpacker(ctx, cs, opts...)
	if err != nil {
		return nil, err
	}
	err = containerdimages.Dispatch(ctx, u.Unpack(containerdimages.ChildrenHandler(cs)), nil, manifest)
	if _, werr := u.Wait(); werr != nil {
		err = werr
	}
	if err != nil {
		return nil, fmt.Errorf("unpack with %s, limit %d: %w", snapshotter, limit, err)
	}
	return &unpacking{ctx: ctx, sn: p.Snapshotter, chain: identity.ChainIDs(diffIDs)}, nil
}

// pausing reads blobs as from a disk that stalls once, in the middle of each.
type pausing struct {
	content.Provider
	pause time.Duration
}

func (p pausing) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	r, err := p.Provider.ReaderAt(ctx, desc)
	if err != nil || p.pause == 0 {
		return r, err
	}
	var once sync.Once
	return &pausingReader{r, func() { once.Do(func() { time.Sleep(p.pause) }) }}, nil
}

type pausingReader struct {
	content.ReaderAt
	pause func()
}

func (r *pausingReader) ReadAt(b []byte, off int64) (int, error) {
	if off > r.Size()/2 {
		r.pause()
	}
	return r.ReaderAt.ReadAt(b, off)
}

// store puts the blobs of an image into the content store.
func (n *node) store(ctx context.Context, img image) (ocispec.Descriptor, []digest.Digest, error) {
	var (
		none    ocispec.Descriptor
		diffIDs []digest.Digest
		layers  []ocispec.Descriptor
	)
	for _, l := range img {
		tar, err := l.tar()
		if err != nil {
			return none, nil, err
		}
		desc, err := n.blob(ctx, ocispec.MediaTypeImageLayer, tar)
		if err != nil {
			return none, nil, err
		}
		layers, diffIDs = append(layers, desc), append(diffIDs, desc.Digest)
	}
	config, err := n.json(ctx, ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: diffIDs},
	})
	if err != nil {
		return none, nil, err
	}
	manifest, err := n.json(ctx, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: layers,
	})
	return manifest, append([]digest.Digest(nil), diffIDs...), err
}

func (n *node) json(ctx context.Context, mediaType string, v any) (ocispec.Descriptor, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return n.blob(ctx, mediaType, body)
}

func (n *node) blob(ctx context.Context, mediaType string, body []byte) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(body), Size: int64(len(body))}
	return desc, content.WriteBlob(ctx, n.db.ContentStore(), desc.Digest.String(), bytes.NewReader(body), desc)
}

// view mounts the unpacked image as a container gets it, read-only, and reads
// all of it.
func (u *unpacking) view() (v view, err error) {
	key := "view"
	top := u.chain[len(u.chain)-1].String()
	// It waits until the image is whole, which View does not.
	if _, err := u.sn.Stat(u.ctx, top); err != nil {
		return v, err
	}
	mounts, err := u.sn.View(u.ctx, key, top)
	if err != nil {
		return v, err
	}
	defer func() { err = errors.Join(err, u.sn.Remove(u.ctx, key)) }()
	return v, mount.WithReadonlyTempMount(u.ctx, mounts, func(dir string) (err error) {
		v, err = readView(dir)
		return err
	})
}

// readView reads a directory in the terms of the reference.
func readView(root string) (view, error) {
	tree, err := kit.Fingerprint(root)
	if err != nil {
		return view{}, err
	}
	v := view{tree, map[string]string{}}
	type id struct{ dev, ino uint64 }
	same := map[id][]string{}
	for name, n := range tree {
		if n.Phantom || n.Mode&fs.ModeDir != 0 {
			continue
		}
		info, err := os.Lstat(filepath.Join(root, name))
		if err != nil {
			return view{}, err
		}
		st := info.Sys().(*syscall.Stat_t)
		same[id{st.Dev, st.Ino}] = append(same[id{st.Dev, st.Ino}], name)
	}
	for _, names := range same {
		v.link(names)
	}
	return v, nil
}

// lose takes the directories of all snapshots away from the daemon, each in one
// step: it may be writing content digests into them. A client that uses an
// image afterwards gets layers that were extracted again.
func (n *node) lose() error {
	dir, lost := filepath.Join(n.daemon.Root, "snapshots"), n.daemon.Root+".lost"
	entries, err := os.ReadDir(dir)
	err = errors.Join(err, os.MkdirAll(lost, 0o700))
	for _, e := range entries {
		err = errors.Join(err, os.Rename(filepath.Join(dir, e.Name()), filepath.Join(lost, e.Name())))
	}
	return errors.Join(err, os.RemoveAll(lost))
}

// remove gives the space of an unpacked image back.
func (u *unpacking) remove() error {
	for i := len(u.chain) - 1; i >= 0; i-- {
		if err := u.sn.Remove(u.ctx, u.chain[i].String()); err != nil {
			return err
		}
	}
	return nil
}

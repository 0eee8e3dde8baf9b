package readiness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

const (
	// stallSlack is how much longer than on a node without a healing things may take.
	stallSlack = 3 * time.Second
	// stallFor is how long the blob is withheld at most, so that a test that fails ends.
	stallFor = 12 * time.Second
)

// slowBlob is a file whose content arrives when release is closed.
type slowBlob struct {
	fs.Inode
	content []byte
	read    chan struct{} // a read has begun
	release chan struct{}
}

func (b *slowBlob) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (b *slowBlob) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = 0o444, uint64(len(b.content))
	return 0
}

func (b *slowBlob) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	select {
	case b.read <- struct{}{}:
	default:
	}
	<-b.release
	end := min(off+int64(len(dest)), int64(len(b.content)))
	return fuse.ReadResultData(b.content[min(off, end):end]), 0
}

// slow withholds the content of a file from all that read it from now on, until
// release is called. At the end of the test the file is what it was.
func slow(t *testing.T, file string) (b *slowBlob, release func()) {
	t.Helper()
	b = &slowBlob{content: must[[]byte](t)(os.ReadFile(file)), read: make(chan struct{}, 1), release: make(chan struct{})}
	root := &fs.Inode{}
	dir := scratch(t)
	server := must[*fuse.Server](t)(fs.Mount(dir, root, &fs.Options{
		MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "slow"},
		OnAdd: func(ctx context.Context) {
			root.AddChild("blob", root.NewPersistentInode(ctx, b, fs.StableAttr{Mode: syscall.S_IFREG}), true)
		},
	}))
	release = sync.OnceFunc(func() { close(b.release) })
	t.Cleanup(func() {
		release()
		// Who has the file open lets go of it now.
		waitFor(t, time.Minute, func() error {
			if err := unix.Unmount(file, 0); err != nil && !errors.Is(err, unix.EINVAL) {
				return os.NewSyscallError("unmount", err)
			}
			return nil
		})
		if err := server.Unmount(); err != nil {
			t.Error(err)
		}
	})
	check(t, unix.Mount(filepath.Join(dir, "blob"), file, "", unix.MS_BIND, ""))
	return b, release
}

// TestStall: while a layer is healed slowly, one Prepare, or View, on it, and one
// removal of an image with its collection, must not hold up what has nothing to do
// with the layer. containerd holds a lock of the whole snapshotter during Prepare and
// View (core/metadata/snapshot.go:297), and its collection waits for that lock
// (:862), with everything else behind it.
func TestStall(t *testing.T) {
	for _, mode := range modes {
		t.Run(mode.name, func(t *testing.T) {
			c := newColliding(t, mode.rebase, true)
			ctx := namespaces.WithNamespace(t.Context(), "stalled")
			for name, create := range map[string]func(context.Context, string, string, ...snapshots.Opt) ([]mount.Mount, error){
				"prepare": c.puller.Client.SnapshotService("durable").Prepare,
				"view":    c.puller.Client.SnapshotService("durable").View,
			} {
				t.Run(name, func(t *testing.T) {
					damaged := c.image(t, "damaged-"+name, 3)
					before, during := c.image(t, "removed-before-"+name, 3), c.image(t, "removed-during-"+name, 3)
					for _, img := range []kit.Pushed{damaged, before, during} {
						c.wantPulled(t, kit.ByTransfer, "stalled", img)
					}
					usual := c.unrelated(t, name+"-before", before)
					dir := c.snapshotDir(t, "stalled", damaged.ChainIDs[1].String())
					blob, release := slow(t, c.Blob(damaged.Layers[1].Digest))
					time.AfterFunc(stallFor, release)
					check(t, os.RemoveAll(filepath.Join(dir, "fs")))

					answered := make(chan error, 1)
					ctx, drop, err := c.puller.Client.WithLease(ctx)
					check(t, err)
					defer func() { check(t, drop(ctx)) }()
					go func() {
						_, err := create(ctx, "stalled-"+name, damaged.ChainIDs[1].String())
						answered <- err
					}()
					receive(t, "read of the blob", blob.read)
					took := c.unrelated(t, name+"-during", during)
					t.Logf("without the healing %v, during it %v", usual, took)
					for what, d := range took {
						if d > usual[what]+stallSlack {
							t.Errorf("%s took %v while an unrelated layer was healed, %v otherwise", what, d, usual[what])
						}
					}
					release()
					t.Logf("%s on the layer: %v", name, receive(t, name, answered))
					c.wantPulled(t, kit.ByTransfer, "stalled", damaged)
				})
			}
		})
	}
}

// unrelated removes one image with its collection, and pulls others into other
// namespaces meanwhile and afterwards. It returns how long each took.
func (c *colliding) unrelated(t *testing.T, name string, removed kit.Pushed) map[string]time.Duration {
	t.Helper()
	took := map[string]time.Duration{}
	timed := func(what string, do func()) {
		began := time.Now()
		do()
		took[what] = time.Since(began).Round(time.Millisecond)
	}
	ctx := namespaces.WithNamespace(t.Context(), "stalled")
	done := make(chan time.Duration, 1)
	go func() {
		began := time.Now()
		if err := c.puller.Client.ImageService().Delete(ctx, removed.Ref, images.SynchronousDelete()); err != nil {
			t.Error(err)
		}
		done <- time.Since(began).Round(time.Millisecond)
	}()
	// From here on a collection may wait for the lock.
	waitFor(t, time.Minute, func() error {
		_, err := c.puller.Client.ImageService().Get(ctx, removed.Ref)
		if err == nil {
			return fmt.Errorf("the image %s is still there", removed.Ref)
		}
		return nil
	})
	for _, way := range kit.Ways {
		img := c.image(t, "unrelated-"+name+"-"+string(way), 3)
		timed("a pull by "+string(way), func() { c.wantPulled(t, way, namespaceOf(way), img) })
	}
	took["the removal"] = receive(t, "removal", done)
	timed("a collection", func() {
		l := must[leases.Lease](t)(c.puller.Client.LeasesService().Create(ctx, leases.WithRandomID()))
		check(t, c.puller.Client.LeasesService().Delete(ctx, l, leases.SynchronousDelete))
	})
	return took
}

// snapshotDir is the daemon's directory of a committed snapshot.
func (c *colliding) snapshotDir(t testing.TB, namespace, name string) string {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), namespace)
	s := c.puller.Client.SnapshotService("durable")
	ctx, drop, err := c.puller.Client.WithLease(ctx)
	check(t, err)
	defer func() { check(t, drop(ctx)) }()
	mounts := must[[]mount.Mount](t)(s.View(ctx, "snapshot-dir", name))
	check(t, s.Remove(ctx, "snapshot-dir"))
	for _, o := range mounts[0].Options {
		if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok {
			top, _, _ := strings.Cut(dirs, ":")
			return filepath.Dir(top)
		}
	}
	return filepath.Dir(mounts[0].Source) // of the lowest layer
}

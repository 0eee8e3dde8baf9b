package full

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// belief is a snapshot in containerd's database.
type belief struct {
	key  string // in containerd
	name string // in the daemon
}

// metaDB is containerd's database.
const metaDB = "root/io.containerd.metadata.v1.bolt/meta.db"

// copyBeliefs copies containerd's database as the crash has left it. It is
// read later, when containerd has shown that it can be: bbolt trusts a file to
// be whole, and reading beyond its end is a fault.
func (l *look) copyBeliefs() (func() ([]belief, error), error) {
	body, err := os.ReadFile(filepath.Join(l.mountpoint, containerdDir, metaDB))
	if errors.Is(err, fs.ErrNotExist) {
		return func() ([]belief, error) { return nil, nil }, nil
	}
	if err != nil {
		return nil, err
	}
	path := filepath.Join(l.scratch, "meta.db")
	return func() ([]belief, error) { return readBeliefs(path) }, os.WriteFile(path, body, 0o600)
}

func readBeliefs(path string) (out []belief, err error) {
	defer func() {
		if p := recover(); p != nil { // bbolt's answer to a page that makes no sense
			err = fmt.Errorf("containerd's database: %v", p)
		}
	}()
	if info, err := os.Stat(path); err != nil || info.Size() == 0 {
		return nil, err // created, and not written to
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true})
	if err != nil {
		return nil, fmt.Errorf("containerd's database: %w", err)
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	return out, db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte("v1"))
		for _, name := range []string{namespace, "snapshots", proxied} {
			if b == nil {
				return nil // nothing was ever prepared
			}
			b = b.Bucket([]byte(name))
		}
		if b == nil {
			return nil
		}
		return b.ForEachBucket(func(key []byte) error {
			out = append(out, belief{string(key), string(b.Bucket(key).Get([]byte("name")))})
			return nil
		})
	})
}

// agree checks that the daemon has what containerd's database has: containerd
// answers from that, and would never ask for such a layer again. Between the
// daemon's Commit and its own transaction containerd still knows the layer by
// the key of its extraction.
func (l *look) agree(read func() ([]belief, error)) error {
	beliefs, err := read()
	if err != nil {
		return err
	}
	last := l.promises[len(l.promises)-1]
	for _, b := range beliefs {
		_, committed := l.seen.Committed[b.name]
		_, active := l.seen.Active[b.name]
		switch {
		case strings.HasPrefix(b.key, "sha256:") && !committed:
			l.find(oracle.Lost, b.name, "it is committed in containerd's database, and the daemon does not have it")
		case !committed && !active && !last.committing(b.name):
			l.find(oracle.Flaw, b.name, "it is in containerd's database, and the daemon does not have it")
		}
	}
	return nil
}

// errUnmeasured ends the asking; the reason is in the result.
var errUnmeasured = errors.New("not measured")

// images compares every image that containerd calls unpacked with its
// reference.
func (l *look) images(ctx context.Context) error {
	listed, err := l.node.client.ImageService().List(ctx)
	if err != nil {
		// A containerd that cannot open its database starts without most of its
		// services.
		l.unmeasured("containerd does not list its images: " + brief(err))
		return errUnmeasured
	}
	names := map[string]bool{}
	for _, i := range listed {
		names[i.Name] = true
		image, ok := l.Recording.bench.image(i.Name)
		if !ok {
			return fmt.Errorf("an image that nobody pulled: %s", i.Name)
		}
		diffIDs, err := client.NewImage(l.node.client, i).RootFS(ctx)
		if err != nil {
			l.counts.Unread++
			l.note("%s is listed and cannot be read: %s", i.Name, brief(err))
			continue
		}
		top := identity.ChainID(diffIDs).String()
		if _, err := l.node.client.SnapshotService(l.node.snapshotter).Stat(ctx, top); err != nil {
			l.unready[i.Name] = brief(err)
			if !errdefs.IsNotFound(err) {
				l.find(oracle.Flaw, i.Name, "stat of its top layer: %v", err)
			}
			continue
		}
		l.compare(ctx, image)
	}
	for ref := range l.promises[0].pulled {
		everywhere := !slices.ContainsFunc(l.promises, func(p promise) bool { return !p.pulled[ref] })
		if everywhere && !names[ref] {
			l.counts.Unlisted++
			l.note("%s was pulled, and is not listed", ref)
		}
	}
	return nil
}

// compare mounts an image that is called unpacked and reads all of it.
func (l *look) compare(ctx context.Context, image Image) {
	err := l.node.view(ctx, image.Top(), func(mounts []mount.Mount) error {
		tree, err := workload.Merged(mounts, l.scratch)
		if err != nil {
			return err
		}
		if diff := kit.Diff(image.Tree, tree, 3); diff != "" {
			return errors.New(diff)
		}
		return nil
	})
	if err != nil {
		l.find(oracle.Lie, image.Ref, "called unpacked, and is not what it should be: %v", err)
		return
	}
	l.equal[image.Ref] = true
	l.counts.Equal++
}

// again pulls every image: a crash must not leave anything in the way.
func (l *look) again(ctx context.Context) {
	for _, image := range l.Recording.bench.images {
		short, cancel := context.WithTimeout(ctx, limit)
		err := l.node.pull(short, image.Ref)
		cancel()
		if err == nil {
			l.counts.Pulled++
			if !l.equal[image.Ref] {
				l.compare(ctx, image)
			}
			continue
		}
		if blob := l.damaged(ctx, image); blob != "" {
			l.counts.Damaged++
			l.note("%s: %s: %s", image.Ref, blob, brief(err))
			continue
		}
		if orphaned(err) {
			l.counts.Orphaned++
		}
		l.find(oracle.Flaw, image.Ref, "pull after the crash: %v", err)
	}
}

// damaged tells which blob of an image containerd believes to have, and cannot
// read or reads wrongly.
func (l *look) damaged(ctx context.Context, image Image) string {
	store := l.node.client.ContentStore()
	manifest := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: image.Manifest}
	for _, d := range append([]ocispec.Descriptor{manifest, image.Config}, image.Layers...) {
		info, err := store.Info(ctx, d.Digest)
		if err != nil {
			continue // it would be fetched
		}
		d.Size = info.Size
		body, err := content.ReadBlob(ctx, store, d)
		if err != nil {
			return fmt.Sprintf("blob %s is in the content store's books and cannot be read: %v", d.Digest, err)
		}
		if got := digest.FromBytes(body); got != d.Digest {
			return fmt.Sprintf("blob %s of the content store is damaged, it is %s now", d.Digest, got)
		}
	}
	return ""
}

// sweep removes everything and has containerd collect the garbage, of which
// nothing may be left: a row or a directory that the crash has left between
// the two databases would be one nobody can remove.
func (l *look) sweep(ctx context.Context) {
	s := l.node.client.SnapshotService(l.node.snapshotter)
	var containers []string
	err := s.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if strings.HasPrefix(info.Name, "container-") {
			containers = append(containers, info.Name)
		}
		return nil
	})
	if err != nil {
		l.find(oracle.Flaw, "", "walk through containerd: %v", err)
	}
	for _, key := range containers {
		if err := l.node.uncontainer(ctx, key); err != nil {
			l.find(oracle.Flaw, key, "%v", err)
		}
	}
	for _, image := range l.Recording.bench.images {
		if err := l.node.remove(ctx, image.Ref); err != nil {
			l.find(oracle.Flaw, image.Ref, "%v", err)
		}
	}
	if err := l.node.unlease(ctx); err != nil {
		l.find(oracle.Flaw, "", "%v", err)
	}
	if left := l.left(ctx); left != nil {
		l.find(oracle.Flaw, "", "everything was removed, and there are left: %v", left)
		return
	}
	l.counts.Swept++
}

// left waits until nothing is left, because directories are deleted in the
// background, and says what is.
func (l *look) left(ctx context.Context) error {
	patience := l.patience
	if patience == 0 {
		patience = 10 * time.Second
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		var left []string
		err := l.daemon.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			left = append(left, info.Kind.String()+" "+info.Name)
			return nil
		})
		for _, sub := range []string{"snapshots", "removing"} {
			entries, err := os.ReadDir(filepath.Join(l.mountpoint, snapshotterDir, sub))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			for _, e := range entries {
				left = append(left, filepath.Join(sub, e.Name()))
			}
		}
		if err == nil && len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.Join(err, errors.New(strings.Join(left, ", ")))
		}
	}
}

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

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// metaDB is containerd's database.
const metaDB = "root/io.containerd.metadata.v1.bolt/meta.db"

// copyMeta copies containerd's database as the crash has left it. It is read
// later, when containerd has shown that it can be: bbolt trusts a file to be
// whole, and reading beyond its end is a fault.
func (l *examination) copyMeta() (path string, err error) {
	path = filepath.Join(l.scratch, "meta.db")
	body, err := os.ReadFile(filepath.Join(l.mountpoint, containerdDir, metaDB))
	if errors.Is(err, fs.ErrNotExist) {
		return path, os.RemoveAll(path) // of the state before
	}
	if err != nil {
		return "", err
	}
	return path, os.WriteFile(path, body, 0o600)
}

// agree checks that the daemon has what containerd's database has: containerd
// answers from that, and would never need such a layer again. Between the
// daemon's Commit and its own transaction containerd still knows the layer by
// the key of its extraction.
func (l *examination) agree(m metadata) {
	last := l.promises[len(l.promises)-1]
	for key, name := range m.names {
		_, committed := l.seen.Committed[name]
		_, active := l.seen.Active[name]
		switch {
		case strings.HasPrefix(key, "sha256:") && !committed:
			l.find(oracle.Lost, name, "it is committed in containerd's database, and the daemon does not have it")
		case !committed && !active && !last.committing(name):
			l.find(oracle.Flaw, name, "it is in containerd's database, and the daemon does not have it")
		}
	}
}

// strayPatience is how long a daemon that can heal nothing is given to drop what
// must stay: longer than its first attempts to reach containerd take.
const strayPatience = 10 * time.Second

// drops waits until the daemon has had containerd drop what has no good blob,
// and checks that it has dropped nothing else.
func (l *examination) drops(ctx context.Context, m metadata) error {
	refused := func(name string) bool { return l.seen.Committed[name].Due }
	l.inventory = l.Recording.bench.inventory(m, l.good, l.Recording.Record)
	if err := l.node.settle(ctx, l.inventory, refused); err != nil {
		l.find(oracle.Flaw, "", "%v", err)
	}
	if l.Recording.Damage == Astray {
		time.Sleep(strayPatience)
	}
	if l.meddle != nil {
		if err := l.meddle(ctx, l.node); err != nil {
			return err
		}
	}
	return l.stays(ctx)
}

// stays checks that the images that must stay are there, and that the daemon has
// not reported a layer with a good blob as one without.
func (l *examination) stays(ctx context.Context) error {
	harmed, err := l.node.harmed(ctx, l.inventory)
	if err != nil {
		return err
	}
	for ref, what := range harmed {
		l.find(oracle.Lie, ref, "%s", what)
	}
	names, err := l.daemon.NoBlob()
	for _, name := range names {
		if l.Recording.Record.Damaged[name] != "" && !slices.Contains(l.Recording.Record.Hopeless, name) {
			l.find(oracle.Lie, name, "it was reported as without a good blob, and its blob is good: its image would be dropped")
		}
	}
	return err
}

// errUnmeasured ends the queries; the reason is in the result.
var errUnmeasured = errors.New("not measured")

// images compares every image that containerd calls unpacked with its
// reference.
func (l *examination) images(ctx context.Context) error {
	listed, err := l.node.client.ImageService().List(ctx)
	if err != nil {
		return err
	}
	names := map[string]bool{}
	for _, i := range listed {
		if l.node.cri != nil && (strings.Contains(i.Name, "@") || strings.HasPrefix(i.Name, "sha256:")) {
			continue // the CRI plugin's own names of the same images
		}
		names[i.Name] = true
		image, ok := l.Recording.bench.image(i.Name)
		if !ok {
			return fmt.Errorf("an image that was never pulled: %s", i.Name)
		}
		diffIDs, err := client.NewImage(l.node.client, i).RootFS(ctx)
		if err != nil {
			l.counts.Unread++
			l.note("%s is listed and cannot be read: %s", i.Name, brief(err))
			continue
		}
		top := identity.ChainID(diffIDs).String()
		if _, err := l.node.client.SnapshotService(l.node.snapshotter).Stat(ctx, top); err != nil {
			if l.Recording.Damage == Astray && errdefs.IsFailedPrecondition(err) {
				continue // nothing can be healed
			}
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

// runs has a container created of every image that the CRI plugin lists, and compares what it
// would see.
func (l *examination) runs(ctx context.Context) error {
	listed, err := l.node.cri.List(ctx)
	if err != nil {
		return err
	}
	for _, ref := range listed {
		image, ok := l.Recording.bench.image(ref)
		if !ok {
			return fmt.Errorf("the CRI plugin lists an image that was never pulled: %s", ref)
		}
		err := l.node.create(ctx, ref, func(mounts []mount.Mount) error {
			tree, err := workload.Merged(mounts, l.scratch)
			if err == nil {
				if diff := kit.Diff(image.Tree, tree, 3); diff != "" {
					err = errors.New(diff)
				}
			}
			return err
		})
		if err != nil {
			l.find(oracle.Lie, ref, "the CRI plugin lists it: %v", err)
			continue
		}
		l.counts.Created++
	}
	for ref := range l.promises[0].pulled {
		everywhere := !slices.ContainsFunc(l.promises, func(p promise) bool { return !p.pulled[ref] })
		if everywhere && !slices.Contains(listed, ref) {
			l.find(oracle.Lost, ref, "its pull by the CRI plugin was answered, and it is not listed")
		}
	}
	return nil
}

// compare mounts an image that is called unpacked and reads all of it.
func (l *examination) compare(ctx context.Context, image Image) {
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
func (l *examination) again(ctx context.Context) {
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

// damaged returns which blob of an image containerd has a record of, and cannot
// read or reads wrongly.
func (l *examination) damaged(ctx context.Context, image Image) string {
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
// the two databases would be one that no client can remove.
func (l *examination) sweep(ctx context.Context) {
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
	if l.node.cri != nil {
		l.unname(ctx)
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

// unname deletes the names that are left of images whose pull was cut short: the CRI plugin
// removes those together that it has loaded together.
func (l *examination) unname(ctx context.Context) {
	listed, err := l.node.client.ImageService().List(ctx)
	for _, i := range listed {
		err = errors.Join(err, l.node.client.ImageService().Delete(ctx, i.Name))
	}
	if err != nil {
		l.find(oracle.Flaw, "", "delete the names that are left: %v", err)
	}
}

// left waits until nothing is left, because directories are deleted in the
// background, and returns what is.
func (l *examination) left(ctx context.Context) error {
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

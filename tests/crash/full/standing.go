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

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// contentDir is containerd's content store, below its directory.
const contentDir = "root/io.containerd.content.v1.content"

// standing is what containerd's database has of one image before a boot.
type standing struct {
	Image
	blobs []digest.Digest // of those that the image refers to, the ones whose files are good
	keys  []string        // of its snapshots
}

// inventory is what containerd has before a boot, and what must become of it.
type inventory struct {
	stay []standing // images of which each damaged layer has a good blob
	hurt []Image    // those of them that have damaged layers
	drop []Image    // the other ones
	// flawed are the snapshots of damaged layers without a good blob: names in the
	// backend, by key. They may be left over when their images are dropped.
	flawed map[string]string
}

// metadata is what a copy of containerd's database has of this package's images.
type metadata struct {
	targets map[string]digest.Digest            // by name of image
	labels  map[digest.Digest]map[string]string // of blobs
	names   map[string]string                   // of snapshots in the backend, by key
}

// readMetadata reads a copy of containerd's database.
func readMetadata(path string) (m metadata, err error) {
	m = metadata{map[string]digest.Digest{}, map[digest.Digest]map[string]string{}, map[string]string{}}
	return m, viewMeta(path, func(tx *bolt.Tx) error {
		if err := eachBucket(tx, func(name string, b *bolt.Bucket) error {
			if target := b.Bucket([]byte("target")); target != nil {
				m.targets[name] = digest.Digest(target.Get([]byte("digest")))
			}
			return nil
		}, "images"); err != nil {
			return err
		}
		if err := eachBucket(tx, func(d string, b *bolt.Bucket) error {
			labels := map[string]string{}
			m.labels[digest.Digest(d)] = labels
			if b = b.Bucket([]byte("labels")); b == nil {
				return nil
			}
			return b.ForEach(func(k, v []byte) error {
				labels[string(k)] = string(v)
				return nil
			})
		}, "content", "blob"); err != nil {
			return err
		}
		return eachBucket(tx, func(key string, b *bolt.Bucket) error {
			m.names[key] = string(b.Get([]byte("name")))
			return nil
		}, "snapshots", proxied)
	})
}

// viewMeta opens a copy of containerd's database.
func viewMeta(path string, fn func(*bolt.Tx) error) (err error) {
	defer func() {
		if p := recover(); p != nil { // bbolt's answer to a page that makes no sense
			err = fmt.Errorf("containerd's database: %v", p)
		}
	}()
	if info, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() == 0 {
		return nil // not created, or created and not written to
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true})
	if err != nil {
		return fmt.Errorf("containerd's database: %w", err)
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	return db.View(fn)
}

// eachBucket visits the buckets of one kind of object in this package's
// namespace.
func eachBucket(tx *bolt.Tx, fn func(key string, b *bolt.Bucket) error, path ...string) error {
	b := tx.Bucket([]byte("v1"))
	for _, name := range append([]string{namespace}, path...) {
		if b == nil {
			return nil
		}
		b = b.Bucket([]byte(name))
	}
	if b == nil {
		return nil
	}
	return b.ForEachBucket(func(key []byte) error { return fn(string(key), b.Bucket(key)) })
}

// goodBlobs reads all blobs of the images from a disk that nothing runs on, and
// returns those that match their digest.
func (b *Bench) goodBlobs(mountpoint string) (map[digest.Digest]bool, error) {
	good := map[digest.Digest]bool{}
	for _, image := range b.images {
		for _, d := range image.descriptors() {
			body, err := os.ReadFile(filepath.Join(mountpoint, containerdDir, contentDir, "blobs", "sha256", d.Digest.Encoded()))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
			good[d.Digest] = err == nil && digest.FromBytes(body) == d.Digest
		}
	}
	return good, nil
}

// descriptors are those of the image's blobs.
func (i Image) descriptors() []ocispec.Descriptor {
	manifest := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: i.Manifest}
	return append([]ocispec.Descriptor{manifest, i.Config}, i.Layers...)
}

// inventory finds out what must become of the images that containerd has. good are
// the blobs whose files are good, and record names the layers that were damaged.
func (b *Bench) inventory(m metadata, good map[digest.Digest]bool, record *workload.Record) inventory {
	out := inventory{flawed: map[string]string{}}
	blobs := b.blobs()
	for key, name := range m.names {
		blob := blobs[digest.Digest(key)]
		if _, row := m.labels[blob]; record.Damaged[name] != "" && !(good[blob] && row) {
			out.flawed[key] = name
		}
	}
	for _, image := range b.images {
		if m.targets[image.Ref] != image.Manifest {
			continue
		}
		ids := image.ChainIDs
		if slices.ContainsFunc(ids, func(id digest.Digest) bool { return out.flawed[id.String()] != "" }) {
			out.drop = append(out.drop, image)
			continue
		}
		if slices.ContainsFunc(ids, func(id digest.Digest) bool { return record.Damaged[m.names[id.String()]] != "" }) {
			out.hurt = append(out.hurt, image)
		}
		s := standing{Image: image}
		// What nothing refers to is containerd's to collect.
		kept := map[digest.Digest]bool{image.Manifest: true}
		for label, to := range m.labels[image.Manifest] {
			if strings.HasPrefix(label, "containerd.io/gc.ref.content.") {
				kept[digest.Digest(to)] = true
			}
		}
		for _, d := range image.descriptors() {
			if _, row := m.labels[d.Digest]; row && good[d.Digest] && kept[d.Digest] {
				s.blobs = append(s.blobs, d.Digest)
			}
		}
		unpacked := m.labels[image.Config.Digest]["containerd.io/gc.ref.snapshot."+proxied] == image.Top() && kept[image.Config.Digest]
		for _, id := range ids {
			if _, row := m.names[id.String()]; row && unpacked {
				s.keys = append(s.keys, id.String())
			}
		}
		out.stay = append(out.stay, s)
	}
	return out
}

// dropped returns what containerd has lost of an image.
func (n *node) dropped(ctx context.Context, s standing) (lost []string, err error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	image, err := n.client.ImageService().Get(ctx, s.Ref)
	switch {
	case errdefs.IsNotFound(err):
		lost = append(lost, "its name")
	case err != nil:
		return nil, err
	case image.Target.Digest != s.Manifest:
		lost = append(lost, "what its name refers to")
	}
	for _, d := range s.blobs {
		if _, err := n.client.ContentStore().Info(ctx, d); errdefs.IsNotFound(err) {
			lost = append(lost, "blob "+d.String())
		} else if err != nil {
			return nil, err
		}
	}
	for _, key := range s.keys {
		// Whether the layer is ready is another question.
		if _, err := n.client.SnapshotService(n.snapshotter).Stat(ctx, key); errdefs.IsNotFound(err) {
			lost = append(lost, "snapshot "+key)
		}
	}
	return lost, nil
}

// droppedWithin bounds the wait until the daemon has had containerd drop images.
// It tries again and again, with pauses of up to 30 seconds, and containerd
// starts later than the daemon.
const droppedWithin = 2 * time.Minute

// settle waits until the damaged layers without a good blob are dropped, and the
// images that have them: until then a pull fails. The daemon refuses those layers.
func (n *node) settle(ctx context.Context, b inventory, refused func(name string) bool) error {
	ctx, stop := context.WithTimeout(namespaces.WithNamespace(ctx, namespace), droppedWithin)
	defer stop()
	until := func(what string, gone func() error) error {
		for {
			err := gone()
			if errdefs.IsNotFound(err) {
				return nil
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("%s is damaged without a good blob, and was not dropped: %w, %w", what, ctx.Err(), err)
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	for key, name := range b.flawed {
		if !refused(name) {
			continue // the daemon has removed it before the power went
		}
		for _, image := range b.drop {
			if !slices.Contains(image.ChainIDs, digest.Digest(key)) {
				continue
			}
			if err := until(image.Ref, func() error {
				_, err := n.client.ImageService().Get(ctx, image.Ref)
				return err
			}); err != nil {
				return err
			}
		}
		if err := until("snapshot "+key, func() error {
			_, err := n.client.SnapshotService(n.snapshotter).Stat(ctx, key)
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// harmed returns what was dropped of images that must stay.
func (n *node) harmed(ctx context.Context, b inventory) (texts map[string]string, err error) {
	texts = map[string]string{}
	for _, s := range b.stay {
		lost, err := n.dropped(ctx, s)
		if err != nil {
			return nil, err
		}
		if len(lost) > 0 {
			slices.Sort(lost)
			texts[s.Ref] = "dropped, although every damaged layer of it has a good blob: " + strings.Join(lost, ", ")
		}
	}
	return texts, nil
}

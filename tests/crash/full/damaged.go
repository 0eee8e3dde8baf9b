package full

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Damage chooses the workload of a node whose layers were damaged by hand before
// the log begins, and whose daemon has containerd drop images.
type Damage uint8

// The kinds of damage.
const (
	NoDamage Damage = iota
	// Damaged: some layers; of some of them the blob is bad, too, and so is that of
	// a layer that is whole.
	Damaged
	// Astray: some layers, all with good blobs, but the content_root of the daemon
	// is a content store that is not containerd's. Nothing can be healed, and
	// nothing may be dropped.
	Astray
)

// strayDir is a content store that nothing uses, on the disk.
const strayDir = "stray"

// wounded is how many layers are damaged.
const wounded = 3

// serving returns the daemon p with the configuration for the containerd whose
// sockets are in run.
func serving(p oracle.Process, run string, damage Damage) oracle.Process {
	store := filepath.Join(containerdDir, contentDir)
	if damage == Astray {
		store = strayDir
	}
	p.Content = "{root}/../" + store
	p.Config += fmt.Sprintf("[containerd]\naddress = %q\nsnapshotter = %q\ndrop_images = true\n", filepath.Join(run, "containerd.sock"), proxied)
	return p
}

// damaged reports whether layers were damaged before the log began.
func (r *Recording) damaged() bool { return len(r.Record.Damaged) > 0 }

// injury is what is on the disk of a node when it was damaged.
type injury struct {
	record *workload.Record // Damaged and Hopeless only
	names  []string         // of all layers in the daemon
	gone   []string         // images that must be dropped
}

// injure has a node pull all images on a disk that nothing records, and damages
// layers and blobs.
func (b *Bench) injure(ctx context.Context, s Setup, d *disk.Disk) (_ *injury, err error) {
	scratch, err := os.MkdirTemp("", "injure")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	mountpoint := filepath.Join(scratch, "disk")
	if err := errors.Join(os.Mkdir(mountpoint, 0o700), d.Mount(s.FS, mountpoint, s.Options...)); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Unmount(), d.DropCache()) }()
	if err := errors.Join(os.MkdirAll(filepath.Join(mountpoint, strayDir, "blobs", "sha256"), 0o700), kit.NewBoot()); err != nil {
		return nil, err
	}
	names, dirs, err := b.fill(ctx, s, mountpoint, filepath.Join(scratch, "run"))
	if err != nil {
		return nil, err
	}
	i := &injury{names: slices.Sorted(maps.Values(names))}
	return i, i.inflict(b, s, mountpoint, names, dirs)
}

// fill has a node pull all images, and returns the names and the trees of their
// layers, by chain ID.
func (b *Bench) fill(ctx context.Context, s Setup, mountpoint, run string) (names, dirs map[digest.Digest]string, err error) {
	names, dirs = map[digest.Digest]string{}, map[digest.Digest]string{}
	daemon, err := serving(s.Daemon, run, s.Damage).Launch(ctx, filepath.Join(mountpoint, snapshotterDir))
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, daemon.Kill()) }()
	n, err := b.boot(ctx, proxied, filepath.Join(mountpoint, containerdDir), s.Daemon.Address, run, false)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, n.stop()) }()
	for _, image := range b.images {
		if err := n.pull(ctx, image.Ref); err != nil {
			return nil, nil, err
		}
		if err := n.view(ctx, image.Top(), func(mounts []mount.Mount) error {
			_, lower, err := workload.Directories(mounts)
			if err == nil && len(lower) != len(image.ChainIDs) {
				err = fmt.Errorf("%s: %d directories for %d layers", image.Ref, len(lower), len(image.ChainIDs))
			}
			if err != nil {
				return err
			}
			for i, id := range image.ChainIDs {
				dirs[id] = lower[len(lower)-1-i]
			}
			return nil
		}); err != nil {
			return nil, nil, err
		}
	}
	// The views are gone from the daemon when containerd collects its garbage.
	if err := n.prune(ctx); err != nil {
		return nil, nil, err
	}
	return names, dirs, daemon.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if id := chainID(info.Name); id != "" && info.Kind == snapshots.KindCommitted {
			names[id] = info.Name
		}
		return nil
	})
}

// badBlobs are the ways in which a blob is bad.
var badBlobs = []func(path string) error{
	os.Remove,
	func(path string) error { return os.Truncate(path, 0) },
	func(path string) error {
		body, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		body[len(body)/2] ^= 0xff
		return os.WriteFile(path, body, 0o444)
	},
}

// inflict damages layers and blobs. What it chooses depends on the seed only.
func (i *injury) inflict(b *Bench, s Setup, mountpoint string, names, dirs map[digest.Digest]string) error {
	random := rand.New(rand.NewPCG(s.Seed, 0x1a7e))
	blobs := b.blobs()
	var layers []digest.Digest // with files in them
	for id, layer := range b.layers {
		if len(layer.tree) > 1 {
			layers = append(layers, id)
		}
	}
	slices.Sort(layers)
	for tries := 0; ; tries++ {
		if tries == 1000 {
			return fmt.Errorf("no choice of layers to damage: %w", lab.ErrBroken)
		}
		random.Shuffle(len(layers), func(i, j int) { layers[i], layers[j] = layers[j], layers[i] })
		patients, bad := layers[:wounded], map[digest.Digest]bool{}
		if s.Damage == Damaged {
			// Of a damaged layer, and of one that is whole.
			bad[blobs[patients[0]]], bad[blobs[layers[wounded]]] = true, true
		}
		i.record = workload.NewRecord()
		mended := i.choose(b, s, patients, bad, names)
		if s.Damage == Damaged && (len(i.gone) == 0 || mended == 0) {
			continue
		}
		for _, id := range patients {
			if err := i.record.Inflict(random, names[id], dirs[id]); err != nil {
				return err
			}
		}
		for _, d := range slices.Sorted(maps.Keys(bad)) {
			path := filepath.Join(mountpoint, containerdDir, contentDir, "blobs", "sha256", d.Encoded())
			if err := badBlobs[random.IntN(len(badBlobs))](path); err != nil {
				return err
			}
		}
		return nil
	}
}

// choose finds out what follows from damage to the patients and to the blobs. It
// returns how many images have damaged layers and can be healed.
func (i *injury) choose(b *Bench, s Setup, patients []digest.Digest, bad map[digest.Digest]bool, names map[digest.Digest]string) (mended int) {
	i.gone = nil
	for _, id := range patients {
		if bad[b.blobs()[id]] || s.Damage == Astray {
			i.record.Hopeless = append(i.record.Hopeless, names[id])
		}
	}
	for _, image := range b.images {
		hurt, gone := false, false
		for n, id := range image.ChainIDs {
			if slices.Contains(patients, id) {
				hurt = true
				gone = gone || bad[image.Layers[n].Digest]
			}
		}
		if gone {
			i.gone = append(i.gone, image.Ref)
		} else if hurt {
			mended++
		}
	}
	return mended
}

// blobs returns the blob of each layer.
func (b *Bench) blobs() map[digest.Digest]digest.Digest {
	out := map[digest.Digest]digest.Digest{}
	for _, image := range b.images {
		for i, id := range image.ChainIDs {
			out[id] = image.Layers[i].Digest
		}
	}
	return out
}

// remind marks what was promised before the log began.
func (w *worker) remind(i *injury) error {
	var errs []error
	for _, name := range i.names {
		_, err := w.disk.Mark(workload.Mark{Phase: workload.Ack, Op: workload.Report, Name: name}.Text())
		errs = append(errs, err)
	}
	for _, image := range w.bench.images {
		if !slices.Contains(i.gone, image.Ref) {
			errs = append(errs, w.mark(workload.Ack, opPull, image.Ref))
		}
	}
	return errors.Join(errs...)
}

// mend is the workload of a node with damaged layers: what has a good blob heals,
// what has none is dropped and pulled again.
func (w *worker) mend(ctx context.Context) error {
	if err := w.node.settle(ctx, w.inventory, func(string) bool { return true }); err != nil {
		return err
	}
	if err := w.unharmed(ctx); err != nil {
		return err
	}
	if w.setup.Damage == Astray {
		return nil
	}
	// Healing ends before the answer.
	for _, image := range w.inventory.hurt {
		short, stop := context.WithTimeout(namespaces.WithNamespace(ctx, namespace), limit)
		_, err := w.node.client.SnapshotService(w.node.snapshotter).Stat(short, image.Top())
		stop()
		if err != nil {
			return fmt.Errorf("%s has a good blob of every damaged layer: %w", image.Ref, err)
		}
	}
	for i, ref := range w.injury.gone {
		if err := w.pull(ctx, ref); err != nil {
			return err
		}
		if image, _ := w.bench.image(ref); i == 0 {
			if err := w.node.container(ctx, "container-again", image.Top()); err != nil {
				return err
			}
		}
	}
	last := w.injury.gone[len(w.injury.gone)-1]
	if err := errors.Join(w.remove(ctx, last), w.pull(ctx, last)); err != nil {
		return err
	}
	return w.unharmed(ctx)
}

// unharmed fails when an image was dropped that must stay, or when the daemon has
// reported a layer as without a good blob that has one.
func (w *worker) unharmed(ctx context.Context) error {
	harmed, err := w.node.harmed(ctx, w.inventory)
	if err != nil {
		return err
	}
	for ref, what := range harmed {
		err = errors.Join(err, fmt.Errorf("lie: %s: %s", ref, what))
	}
	names, readErr := w.daemon.NoBlob()
	for _, name := range names {
		if !slices.Contains(w.injury.record.Hopeless, name) {
			err = errors.Join(err, fmt.Errorf("lie: %s: reported as without a good blob, and its blob is good", name))
		}
	}
	return errors.Join(err, readErr)
}

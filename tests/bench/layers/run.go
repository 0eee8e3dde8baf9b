package layers

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	"github.com/containerd/containerd/v2/core/diff"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/published"
	"github.com/durable-snapshotter/durable-snapshotter/tests/bench/pulls"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Options describe a run.
type Options struct {
	Rounds   int
	Chain    int   // layers of a chain
	Neighbor int64 // bytes a second that the neighbor writes to its pages
	FS       string
	Command  string // for the report
	Log      func(format string, args ...any)
}

// settings are those of sync.
var settings = []fsync.Mode{fsync.Auto, fsync.Syncfs, fsync.OwnFiles}

// Run measures. It must be called within kit.Main, of a program that calls pulls.Init. An error may
// come with what has been measured until then.
func Run(ctx context.Context, o Options) (r *Report, err error) {
	o.Log("build the daemon and containerd (minutes the first time)")
	bins, err := kit.Build(ctx)
	if err != nil {
		return nil, err
	}
	r = &Report{FS: o.FS, Neighbor: o.Neighbor, Rounds: o.Rounds, Chain: o.Chain}
	if r.Origin, err = published.Describe(ctx, bins, Schema, o.Command); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "layers-")
	if err != nil {
		return nil, err
	}
	n := &node{dir: dir}
	defer func() { err = errors.Join(err, n.close(), os.RemoveAll(dir)) }()
	if err := n.start(ctx, o.FS, bins); err != nil {
		return nil, err
	}
	all := map[row][]layer{}
	for round := range o.Rounds + 1 { // the first warms it up
		for _, beside := range []bool{false, true} {
			o.Log("round %d of %d, neighbor: %v", round, o.Rounds, beside)
			if err := n.round(ctx, o, round, beside, all); err != nil {
				return r, err
			}
		}
	}
	for _, s := range settings {
		for _, beside := range []bool{false, true} {
			r.add(s, beside, all[row{s, beside}])
		}
	}
	return r, nil
}

// row is what layers are counted together for.
type row struct {
	sync   fsync.Mode
	beside bool
}

// layer is what one took, and a flush after it, in seconds, and how fast the neighbor was, in bytes a second.
type layer struct{ apply, sync, commit, flush, rate float64 }

// node is a disk with a daemon for each setting.
type node struct {
	dir     string
	disk    *kit.Disk
	flushed *os.File // on the disk
	layer   ocispec.Descriptor
	daemons map[fsync.Mode]*daemon
}

type daemon struct {
	*kit.Daemon
	conn   *grpc.ClientConn
	sn     snapshots.Snapshotter
	differ diff.Applier
}

func (n *node) start(ctx context.Context, fs string, bins kit.Binaries) (err error) {
	if n.disk, err = kit.NewDisk(filepath.Join(n.dir, "disk"), kit.DiskOptions{FS: fs, Size: 8 << 30, Direct: true}); err != nil {
		return err
	}
	if n.flushed, err = os.Create(n.disk.Path("flushed")); err != nil {
		return err
	}
	content := filepath.Join(n.dir, "content")
	if n.layer, err = makeLayer(content); err != nil {
		return err
	}
	n.daemons = map[fsync.Mode]*daemon{}
	for _, s := range settings {
		d := &daemon{}
		n.daemons[s] = d
		d.Daemon, err = kit.NewDaemon(kit.DaemonOptions{
			Binary: bins.Daemon, Dir: n.disk.Path(string(s)), RunDir: filepath.Join(n.dir, string(s)), LogLevel: "info",
			Config: fmt.Sprintf("[diff]\nsync = %q\n", s), ContentRoot: content,
		})
		if err != nil {
			return err
		}
		if err := d.Start(ctx); err != nil {
			return err
		}
		if d.sn, err = d.Snapshotter(); err != nil {
			return err
		}
		if d.conn, err = d.Dial(); err != nil {
			return err
		}
		d.differ = diffproxy.NewDiffApplier(diffapi.NewDiffClient(d.conn)).(diff.Applier)
	}
	return nil
}

func (n *node) close() error {
	var errs []error
	for _, d := range n.daemons {
		if d.sn != nil {
			errs = append(errs, d.sn.Close())
		}
		if d.conn != nil {
			errs = append(errs, d.conn.Close())
		}
		if d.Daemon != nil {
			errs = append(errs, d.Stop())
		}
	}
	if n.flushed != nil {
		errs = append(errs, n.flushed.Close())
	}
	if n.disk != nil {
		errs = append(errs, n.disk.Close())
	}
	return errors.Join(errs...)
}

// flush writes the first page of a file, and waits until it is durable: what a Commit does three times.
func flush(f *os.File) error {
	_, err := f.WriteAt(make([]byte, 4096), 0)
	return errors.Join(err, unix.Fdatasync(int(f.Fd())))
}

// makeLayer puts a layer into a content store: 400 files in 20 directories, of 2 to 12 KiB, but each
// 20th of 128 KiB, with content that is random.
func makeLayer(content string) (ocispec.Descriptor, error) {
	random := rand.NewChaCha8([32]byte{1})
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for d := range 20 {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("dir%d/", d), Mode: 0o755}); err != nil {
			return ocispec.Descriptor{}, err
		}
		for f := range 20 {
			data := make([]byte, (2+f%11)<<10)
			if f == 0 {
				data = make([]byte, 128<<10)
			}
			_, _ = random.Read(data) // never fails
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("dir%d/file%d", d, f), Mode: 0o644, Size: int64(len(data))}); err != nil {
				return ocispec.Descriptor{}, err
			}
			if _, err := w.Write(data); err != nil {
				return ocispec.Descriptor{}, err
			}
		}
	}
	if err := w.Close(); err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(b.Bytes()), Size: int64(b.Len())}
	blobs := filepath.Join(content, "blobs/sha256")
	return desc, errors.Join(os.MkdirAll(blobs, 0o755), os.WriteFile(filepath.Join(blobs, desc.Digest.Encoded()), b.Bytes(), 0o444))
}

// round extracts a chain with each setting, beside the neighbor if it is wanted.
func (n *node) round(ctx context.Context, o Options, round int, beside bool, all map[row][]layer) error {
	for i := range settings {
		s := settings[(round+i)%len(settings)]
		if err := n.disk.Sync(); err != nil {
			return err
		}
		var neighbor *pulls.Neighbor
		if beside {
			var err error
			if neighbor, err = pulls.StartNeighbor(n.disk.Path("neighbor"), o.Neighbor); err != nil {
				return err
			}
			time.Sleep(time.Second) // until there are dirty pages
		}
		chain, err := n.daemons[s].chain(ctx, n.layer, n.flushed, round, o.Chain)
		if beside {
			rate, e := neighbor.End()
			err = errors.Join(err, e)
			for i := range chain {
				chain[i].rate = rate
			}
		}
		if err != nil {
			return fmt.Errorf("sync = %s: %w", s, err)
		}
		if round > 0 {
			all[row{s, beside}] = append(all[row{s, beside}], chain...)
		}
	}
	return nil
}

// chain extracts and commits layers, one on another, and removes them. flushed is a file of a page.
func (d *daemon) chain(ctx context.Context, desc ocispec.Descriptor, flushed *os.File, round, length int) (all []layer, err error) {
	var names []string
	parent := ""
	for i := range length {
		chainID := fmt.Sprintf("sha256:%064x", i)
		name, key := fmt.Sprintf("k8s.io/%d/%s", i, chainID), fmt.Sprintf("k8s.io/%d/extract-%d-x %s", i, round, chainID)
		mounts, err := d.sn.Prepare(ctx, key, parent)
		if err != nil {
			return nil, err
		}
		before, err := d.synced(ctx)
		if err != nil {
			return nil, err
		}
		began := time.Now()
		if _, err := d.differ.Apply(ctx, desc, mounts); err != nil {
			return nil, err
		}
		l := layer{apply: time.Since(began).Seconds()}
		after, err := d.synced(ctx)
		if err != nil {
			return nil, err
		}
		l.sync = after - before
		began = time.Now()
		if err := d.sn.Commit(ctx, name, key); err != nil {
			return nil, err
		}
		l.commit = time.Since(began).Seconds()
		began = time.Now()
		if err := flush(flushed); err != nil {
			return nil, err
		}
		l.flush = time.Since(began).Seconds()
		all, names, parent = append(all, l), append(names, name), name
	}
	for i := range names {
		if err := d.sn.Remove(ctx, names[len(names)-1-i]); err != nil {
			return nil, err
		}
	}
	return all, d.sn.(snapshots.Cleaner).Cleanup(ctx)
}

// synced is how many seconds the syncs of all Applies have taken.
func (d *daemon) synced(ctx context.Context) (float64, error) {
	all, err := d.Metrics(ctx)
	if err != nil {
		return 0, err
	}
	for _, m := range all["durable_snapshotter_apply_phase_duration_seconds"].GetMetric() {
		for _, l := range m.GetLabel() {
			if l.GetValue() == "sync" {
				return m.GetHistogram().GetSampleSum(), nil
			}
		}
	}
	return 0, nil // none yet
}

package bench

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/extract"
	"github.com/durable-snapshotter/durable-snapshotter/internal/inflate"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// extractor makes a tree out of a blob, and returns the diff ID.
type extractor struct {
	name string
	run  func(ctx context.Context, blob *os.File, dir string) (digest.Digest, error)
}

// byContainerd does what containerd's diff service does (core/diff/apply), without igzip.
var byContainerd = extractor{"containerd", func(ctx context.Context, blob *os.File, dir string) (digest.Digest, error) {
	plain, err := compression.DecompressStream(blob)
	if err != nil {
		return "", err
	}
	defer plain.Close()
	digester := digest.Canonical.Digester()
	r := io.TeeReader(plain, digester.Hash())
	if _, err := archive.Apply(ctx, dir, r, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)); err != nil {
		return "", err
	}
	_, err = io.Copy(io.Discard, r)
	return digester.Digest(), err
}}

func ours(name, igzip string, digests bool) extractor {
	return extractor{name, func(ctx context.Context, blob *os.File, dir string) (digest.Digest, error) {
		plain, err := inflate.File(ctx, blob, igzip)
		if err != nil {
			return "", err
		}
		defer plain.Close()
		r, err := extract.Apply(ctx, extract.Options{Dir: dir, Tar: plain, Digests: digests})
		return r.DiffID, err
	}}
}

// BenchmarkExtract makes the tree of one large layer with containerd's applier and with
// ours, in turn, each followed by a syncfs. Ratios are to containerd without its syncfs;
// those of processor time are to containerd with it.
func BenchmarkExtract(b *testing.B) {
	b.Setenv("CONTAINERD_DISABLE_IGZIP", "1") // the process keeps what it finds first
	disk := newDisk(b, kit.DiskOptions{Size: 6 << 30})
	all := []extractor{byContainerd, ours("ours", "", false), ours("digests", "", true)}
	os.Unsetenv("CONTAINERD_DISABLE_IGZIP")
	if igzip := inflate.Igzip(); igzip != "" {
		all = append(all, ours("igzip", igzip, false), ours("igzip+digests", igzip, true))
	} else {
		b.Log("igzip is not installed: it is not measured")
	}
	os.Setenv("CONTAINERD_DISABLE_IGZIP", "1")
	for _, packing := range []string{"gzip", "zstd", "plain"} {
		path, want := largeLayer(b, packing)
		b.Run(packing, func(b *testing.B) {
			took, durable, cpu := map[string][]time.Duration{}, map[string][]time.Duration{}, map[string][]time.Duration{}
			for n := 0; b.Loop(); n++ {
				for _, x := range all {
					if packing != "gzip" && (x.name == "igzip" || x.name == "igzip+digests") {
						continue
					}
					extraction, whole, used := extractOnce(b, disk, x, path, want)
					if n == 0 {
						continue // it fills caches
					}
					took[x.name], durable[x.name], cpu[x.name] = append(took[x.name], extraction), append(durable[x.name], whole), append(cpu[x.name], used)
				}
			}
			if len(took) == 0 {
				b.Skip("one round fills caches only: -benchtime 2x or more")
			}
			base := median(took["containerd"]).Seconds()
			b.ReportMetric(base, "containerd-s")
			for _, x := range all {
				if len(took[x.name]) > 0 {
					b.ReportMetric(median(durable[x.name]).Seconds()/base, x.name+"-durable/containerd")
					b.ReportMetric(median(cpu[x.name]).Seconds()/median(cpu["containerd"]).Seconds(), x.name+"-cpu/containerd")
				}
			}
		})
	}
}

// extractOnce returns the time of the extraction, that with a syncfs, and the time of the
// processors for both.
func extractOnce(b *testing.B, disk *kit.Disk, x extractor, path string, want digest.Digest) (extraction, whole, cpu time.Duration) {
	b.Helper()
	dir := disk.Path("layer")
	blob, err := os.Open(path)
	if err = errors.Join(err, os.Mkdir(dir, 0o755)); err != nil {
		b.Fatal(err)
	}
	defer blob.Close()
	before, start := processorTime(), time.Now()
	diffID, err := x.run(b.Context(), blob, dir)
	extraction = time.Since(start)
	if err != nil || diffID != want {
		b.Fatal(x.name, diffID, err)
	}
	syncDisk(b, disk)
	whole, cpu = time.Since(start), processorTime()-before
	if err := os.RemoveAll(dir); err != nil {
		b.Fatal(err)
	}
	syncDisk(b, disk)
	return extraction, whole, cpu
}

// processorTime is that of this process and of its children that have ended.
func processorTime() (sum time.Duration) {
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		_ = unix.Getrusage(who, &u) // fails for an unknown who only
		sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return sum
}

// largeLayer writes a layer of 465 MiB in 21,413 entries, of which 792 files have three
// quarters of the bytes, and returns its diff ID. gzip makes 40 % of it. With -short it is
// an eighth of that.
func largeLayer(b *testing.B, packing string) (path string, diffID digest.Digest) {
	b.Helper()
	path = filepath.Join(scratch(b), "layer."+packing)
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	packed := io.WriteCloser(f)
	switch packing {
	case "gzip":
		packed = gzip.NewWriter(f)
	case "zstd":
		if packed, err = zstd.NewWriter(f); err != nil {
			b.Fatal(err)
		}
	}
	digester := digest.Canonical.Digester()
	if err := writeLayer(io.MultiWriter(packed, digester.Hash())); err != nil {
		b.Fatal(err)
	}
	if packing != "plain" {
		if err := packed.Close(); err != nil {
			b.Fatal(err)
		}
	}
	return path, digester.Digest()
}

func writeLayer(to io.Writer) error {
	dirs, files, links, large := 2315, 18_790, 308, 792
	if testing.Short() {
		dirs, files, links, large = dirs/8, files/8, links/8, large/8
	}
	const (
		largeBytes = 455 << 10
		smallBytes = 6_900
	)
	r := rand.New(rand.NewPCG(3, 4))
	words := make([][]byte, 4096)
	for i := range words {
		words[i] = make([]byte, 3+r.IntN(9))
		for j := range words[i] {
			words[i][j] = byte('a' + r.IntN(26))
		}
	}
	var body bytes.Buffer
	content := func(n int) []byte {
		body.Reset()
		for body.Len() < n {
			if r.IntN(12) == 0 {
				fmt.Fprintf(&body, "%016x", r.Uint64())
			}
			body.Write(words[r.IntN(1+r.IntN(len(words)))])
			body.WriteByte(' ')
		}
		return body.Bytes()[:n]
	}
	w := tar.NewWriter(to)
	at := time.Unix(1_600_000_000, 0)
	add := func(h tar.Header, body []byte) error {
		h.ModTime, h.Size = at, int64(len(body))
		if err := w.WriteHeader(&h); err != nil {
			return err
		}
		_, err := w.Write(body)
		return err
	}
	for d := range dirs {
		name := fmt.Sprintf("usr/share/package%d/sub%d", d/7, d)
		if d%7 == 0 {
			name = fmt.Sprintf("usr/share/package%d", d/7)
		}
		if err := add(tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755}, nil); err != nil {
			return err
		}
		for i := d; i < files; i += dirs {
			n := smallBytes/4 + r.IntN(smallBytes*3/2)
			if i%(files/large) == 0 {
				n = largeBytes/4 + r.IntN(largeBytes*3/2)
			}
			if err := add(tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%s/file-%d.dat", name, i), Mode: 0o644}, content(n)); err != nil {
				return err
			}
		}
		if d < links {
			if err := add(tar.Header{Typeflag: tar.TypeSymlink, Name: name + "/link", Linkname: "file-1.dat", Mode: 0o777}, nil); err != nil {
				return err
			}
		}
	}
	return w.Close()
}

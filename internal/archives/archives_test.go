package archives

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	exporter "github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestMain(m *testing.M) {
	if err := log.SetLevel("error"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// image is one of three layers, the last of which is the same as the first, in a content
// store that containerd's own code writes.
type image struct {
	testing.TB
	store            content.Store
	manifest, config ocispec.Descriptor
	layers           []ocispec.Descriptor
	tars             [][]byte
	diffIDs, chains  []digest.Digest
}

func layerTar(t testing.TB, seed byte, size int) []byte {
	t.Helper()
	body := make([]byte, size)
	rand.NewChaCha8([32]byte{seed}).Read(body)
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	check(t, w.WriteHeader(&tar.Header{Name: fmt.Sprint("file", seed), Mode: 0o644, Size: int64(size)}))
	_, err := w.Write(body)
	check(t, errors.Join(err, w.Close()))
	return buf.Bytes()
}

func (m *image) put(mediaType string, p []byte) ocispec.Descriptor {
	m.Helper()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(p), Size: int64(len(p))}
	if err := content.WriteBlob(context.Background(), m.store, d.Digest.String(), bytes.NewReader(p), d); !errdefs.IsAlreadyExists(err) {
		check(m, err)
	}
	return d
}

func newImage(t testing.TB) *image {
	t.Helper()
	store, err := local.NewStore(t.TempDir())
	check(t, err)
	m := &image{TB: t, store: store}
	for _, seed := range []byte{1, 2, 1} {
		layer := layerTar(t, seed, 100_000)
		m.tars = append(m.tars, layer)
		m.diffIDs = append(m.diffIDs, digest.FromBytes(layer))
		m.layers = append(m.layers, m.put(ocispec.MediaTypeImageLayerGzip, packings["gzip"](t, layer)))
	}
	m.chains = identity.ChainIDs(slices.Clone(m.diffIDs))
	platform := ocispec.Platform{OS: "linux", Architecture: "amd64"}
	config, err := json.Marshal(ocispec.Image{Platform: platform, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: m.diffIDs}})
	check(t, err)
	m.config = m.put(ocispec.MediaTypeImageConfig, config)
	doc := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: m.config, Layers: m.layers}
	doc.SchemaVersion = 2
	text, err := json.Marshal(doc)
	check(t, err)
	m.manifest = m.put(ocispec.MediaTypeImageManifest, text)
	return m
}

func (m *image) want(i int) blobs.Layer {
	l := blobs.Layer{ChainID: m.chains[i].String(), Entries: 2, Bytes: 100_000}
	if i > 0 {
		l.Parent = m.chains[i-1].String()
	}
	return l
}

func (m *image) export(opts ...exporter.ExportOpt) []byte {
	m.Helper()
	var buf bytes.Buffer
	check(m, exporter.Export(context.Background(), m.store, &buf, append(opts, exporter.WithManifest(m.manifest, "docker.io/library/test:1"))...))
	return buf.Bytes()
}

// entry is one of an archive that a test writes.
type entry struct {
	name, link string
	body       []byte
}

func tarOf(t testing.TB, all ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range all {
		h := &tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.body)), Typeflag: tar.TypeReg, Linkname: e.link}
		if e.link != "" {
			h.Typeflag = tar.TypeSymlink
		}
		check(t, w.WriteHeader(h))
		_, err := w.Write(e.body)
		check(t, err)
	}
	check(t, w.Close())
	return buf.Bytes()
}

func (m *image) configText() []byte {
	m.Helper()
	text, err := content.ReadBlob(context.Background(), m.store, m.config)
	check(m, err)
	return text
}

// save writes what docker save wrote before it knew OCI: layers by the digests of their
// configurations, one that is there already as a link, and the list at the end.
func (m *image) save() []byte {
	m.Helper()
	list, err := json.Marshal([]map[string]any{{"Config": m.config.Digest.Encoded() + ".json", "RepoTags": []string{"test:1"},
		"Layers": []string{"aaa/layer.tar", "bbb/layer.tar", "ccc/layer.tar"}}})
	check(m, err)
	return tarOf(m,
		entry{name: "aaa/VERSION", body: []byte("1.0")}, entry{name: "aaa/json", body: []byte("{}")}, entry{name: "aaa/layer.tar", body: m.tars[0]},
		entry{name: "bbb/layer.tar", body: m.tars[1]},
		entry{name: "ccc/layer.tar", link: "../aaa/layer.tar"},
		entry{name: m.config.Digest.Encoded() + ".json", body: m.configText()},
		entry{name: "manifest.json", body: list}, entry{name: "repositories", body: []byte("{}")})
}

var packings = map[string]func(testing.TB, []byte) []byte{
	"plain": func(_ testing.TB, p []byte) []byte { return p },
	"gzip": func(t testing.TB, p []byte) []byte {
		var buf bytes.Buffer
		w := gzip.NewWriter(&buf)
		_, err := w.Write(p)
		check(t, errors.Join(err, w.Close()))
		return buf.Bytes()
	},
	"zstd": func(t testing.TB, p []byte) []byte {
		w, err := zstd.NewWriter(nil)
		check(t, err)
		return w.EncodeAll(p, nil)
	},
	"bzip2": func(t testing.TB, p []byte) []byte {
		cmd := exec.Command("bzip2", "-c")
		cmd.Stdin = bytes.NewReader(p)
		out, err := cmd.Output()
		if errors.Is(err, exec.ErrNotFound) {
			t.Skip("there is no bzip2")
		}
		check(t, err)
		return out
	},
}

// in writes a file of an archive into a directory of its own, and opens that.
func in(t testing.TB, p []byte) (*Set, string) {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "images.tar")
	check(t, os.WriteFile(file, p, 0o644))
	return Open([]string{dir}), file
}

// tarOfLayer reads a layer as healing does.
func tarOfLayer(s *Set, want blobs.Layer) (got []byte, used blobs.Blob, err error) {
	err = s.Try(context.Background(), want, func(b blobs.Blob) error {
		r, err := b.Layer(context.Background())
		if err != nil {
			return err
		}
		defer r.Close()
		got, err = io.ReadAll(r)
		used = b
		return err
	})
	return got, used, err
}

// TestFormats: every layer of an image is found in every format and compression, also by a
// chain ID alone, and is what its diff ID is of.
func TestFormats(t *testing.T) {
	m := newImage(t)
	for format, p := range map[string][]byte{
		"exported":                m.export(),
		"exported without docker": m.export(exporter.WithSkipDockerManifest()),
		"docker save":             m.save(),
	} {
		for packing, pack := range packings {
			if packing == "bzip2" && format != "exported" {
				continue // it is slow
			}
			t.Run(format+" "+packing, func(t *testing.T) {
				s, file := in(t, pack(t, p))
				for i := range m.chains {
					for _, want := range []blobs.Layer{m.want(i), {ChainID: m.chains[i].String()}} {
						got, used, err := tarOfLayer(s, want)
						check(t, err)
						if !bytes.Equal(got, m.tars[i]) {
							t.Errorf("layer %d is another tar", i)
						}
						if !strings.Contains(used.Place, file) || used.DiffID != m.diffIDs[i] {
							t.Errorf("layer %d: used %+v", i, used)
						}
						if format != "docker save" && used.Digest != m.layers[i].Digest {
							t.Errorf("layer %d: the blob is %s, want %s", i, used.Digest, m.layers[i].Digest)
						}
						raw, err := used.Raw(t.Context())
						check(t, err)
						p, err := io.ReadAll(raw)
						check(t, errors.Join(err, raw.Close()))
						if used.Digest != "" && digest.FromBytes(p) != used.Digest || int64(len(p)) != used.Size {
							t.Errorf("layer %d: %d raw bytes, digest %s, of %+v", i, len(p), digest.FromBytes(p), used)
						}
					}
				}
			})
		}
	}
}

// TestReadOnce: an archive is read again only when it has changed; one that appears or goes is
// noticed.
func TestReadOnce(t *testing.T) {
	m := newImage(t)
	dir := filepath.Join(t.TempDir(), "not", "there", "yet")
	s := Open([]string{dir, filepath.Join(dir, "one.tar")})
	refused := func(kind error) {
		t.Helper()
		if _, err := s.Find(t.Context(), m.want(1)); !errors.Is(err, kind) || !blobs.Bad(err) {
			t.Errorf("error %v, want the kind %v", err, kind)
		}
	}
	refused(blobs.ErrNotFound)
	check(t, os.MkdirAll(dir, 0o755))
	refused(blobs.ErrNotFound)
	file := filepath.Join(dir, "one.tar")
	check(t, os.WriteFile(file, m.export(), 0o644))
	_, first, err := tarOfLayer(s, m.want(1))
	check(t, err)
	a := s.known[file]
	if _, _, err := tarOfLayer(s, m.want(1)); err != nil || s.known[file] != a || a == nil {
		t.Errorf("read again, or error %v", err)
	}
	check(t, os.WriteFile(file, m.save(), 0o644))
	if _, err := first.Raw(t.Context()); !errors.Is(err, blobs.ErrCannot) {
		t.Errorf("a blob of the file that was there: error %v", err)
	}
	if _, used, err := tarOfLayer(s, m.want(1)); err != nil || used.Digest != "" {
		t.Errorf("used %+v, error %v", used, err)
	}
	check(t, os.Remove(file))
	refused(blobs.ErrNotFound)
	if len(s.known) > 0 {
		t.Error("what is gone is kept")
	}
}

// TestHostile: an archive that is cut, damaged or made to deceive, and what is no archive, is
// of no use, and the good one beside it is.
func TestHostile(t *testing.T) {
	m := newImage(t)
	whole := m.export()
	other := layerTar(t, 9, 100_000)
	flipped := bytes.Clone(whole)
	flipped[bytes.Index(flipped, packings["gzip"](t, m.tars[1]))+50_000] ^= 0xff
	list := func(layers ...string) []byte {
		text, err := json.Marshal([]map[string]any{{"Config": "c.json", "Layers": layers}})
		check(t, err)
		return text
	}
	saved := func(more ...entry) []byte {
		return tarOf(t, append([]entry{{name: "c.json", body: m.configText()}}, more...)...)
	}
	huge := func() []byte {
		p := saved(entry{name: "a", body: m.tars[0]}, entry{name: "b", body: m.tars[1]}, entry{name: "manifest.json", body: list("a", "b", "a")})
		at := bytes.Index(p, append([]byte("b"), make([]byte, 99)...)) // the header of b
		copy(p[at+124:], "\x80\x00\x00\x00\x0f\xff\xff\xff\xff\xff\xff\xff")
		sum := 8 * int(' ')
		for i, c := range p[at : at+512] {
			if i < 148 || i >= 156 {
				sum += int(c)
			}
		}
		copy(p[at+148:], fmt.Sprintf("%06o\x00 ", sum))
		return p
	}
	bomb := func() []byte {
		w := &bytes.Buffer{}
		z, err := zstd.NewWriter(w)
		check(t, err)
		tw := tar.NewWriter(z)
		check(t, tw.WriteHeader(&tar.Header{Name: "zeros", Typeflag: tar.TypeReg, Size: 5 << 28}))
		zeros := make([]byte, 1<<20)
		for range 5 << 8 {
			_, err := tw.Write(zeros)
			check(t, err)
		}
		check(t, errors.Join(tw.Close(), z.Close()))
		return w.Bytes()
	}
	for name, c := range map[string]struct {
		file []byte
		kind error // of the layer 1 with this archive alone
	}{
		"cut in the layer":           {whole[:bytes.Index(whole, packings["gzip"](t, m.tars[1]))+50_000], blobs.ErrCorrupt},
		"cut in the middle, gzip":    {packings["gzip"](t, whole)[:150_000], blobs.ErrCorrupt},
		"cut in the middle, zstd":    {packings["zstd"](t, whole)[:150_000], blobs.ErrCorrupt},
		"cut behind the first tar":   {m.save()[:120_000], blobs.ErrCorrupt},
		"a flipped bit":              {flipped, blobs.ErrCorrupt},
		"another layer is claimed":   {saved(entry{name: "a", body: m.tars[0]}, entry{name: "b", body: other}, entry{name: "manifest.json", body: list("a", "b", "a")}), blobs.ErrNotFound},
		"garbage is claimed":         {saved(entry{name: "b", body: []byte("\x1f\x8b\x08garbage")}, entry{name: "manifest.json", body: list("x", "b", "x")}), blobs.ErrCorrupt},
		"a size of 2^60":             {huge(), blobs.ErrCorrupt},
		"links in a circle":          {saved(entry{name: "a", link: "b"}, entry{name: "b", link: "a"}, entry{name: "manifest.json", body: list("a", "b", "a")}), blobs.ErrNotFound},
		"fewer layers than diff IDs": {saved(entry{name: "b", body: m.tars[1]}, entry{name: "manifest.json", body: list("b")}), blobs.ErrNotFound},
		"names that lead out":        {saved(entry{name: "../../../../etc/passwd", body: []byte("x")}, entry{name: "manifest.json", body: list("../../etc/passwd", "/etc/passwd", "x")}), blobs.ErrNotFound},
		"a list that is no JSON":     {saved(entry{name: "manifest.json", body: []byte("[{" + strings.Repeat("[", 100_000))}), blobs.ErrNotFound},
		"too many entries":           {tarOf(t, slices.Repeat([]entry{{name: "x"}}, maxEntries+1)...), blobs.ErrCannot},
		"too many documents":         {tarOf(t, slices.Repeat([]entry{{name: "x", body: append([]byte("{"), make([]byte, maxDocument-1)...)}}, maxDocuments/maxDocument+1)...), blobs.ErrCannot},
		"lz4":                        {append([]byte{0x04, 0x22, 0x4d, 0x18}, whole...), blobs.ErrCannot},
		"xz":                         {append([]byte("\xfd7zXZ\x00"), whole...), blobs.ErrCannot},
		"a bomb":                     {bomb(), blobs.ErrCorrupt},
		"a list of images":           {[]byte("docker.io/library/busybox:latest\n"), blobs.ErrNotFound},
		"an empty file":              {nil, blobs.ErrNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			s, file := in(t, c.file)
			_, _, err := tarOfLayer(s, m.want(1))
			if !errors.Is(err, c.kind) {
				t.Errorf("error %v, want the kind %v", err, c.kind)
			}
			if blobs.Bad(err) == (c.kind == blobs.ErrCannot) {
				t.Errorf("bad is %v: %v", blobs.Bad(err), err)
			}
			check(t, os.WriteFile(filepath.Join(filepath.Dir(file), "z.tar"), whole, 0o644))
			if got, _, err := tarOfLayer(s, m.want(1)); err != nil || !bytes.Equal(got, m.tars[1]) {
				t.Errorf("the good archive beside it is not used: %v", err)
			}
		})
	}
}

// TestCannotBeRead: a directory or a file that cannot be read is no evidence that a layer is
// in no archive.
func TestCannotBeRead(t *testing.T) {
	m := newImage(t)
	dir := t.TempDir()
	loop := filepath.Join(dir, "loop.tar")
	check(t, os.Symlink(loop, loop))
	check(t, os.Mkdir(filepath.Join(dir, "more"), 0o755)) // is not read
	for _, path := range []string{dir, loop} {
		_, err := Open([]string{path}).Find(t.Context(), m.want(0))
		if !errors.Is(err, blobs.ErrCannot) || blobs.Bad(err) {
			t.Errorf("error %v", err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s, _ := in(t, m.export())
	if _, err := s.Find(ctx, m.want(0)); !errors.Is(err, context.Canceled) || blobs.Unusable(err) {
		t.Errorf("error %v", err)
	}
	if got, _, err := tarOfLayer(s, m.want(0)); err != nil || !bytes.Equal(got, m.tars[0]) {
		t.Errorf("after a search that was interrupted: %v", err)
	}
}

// FuzzArchive: whatever is in a file, reading it ends without a panic, and gives no layer
// that has another diff ID.
func FuzzArchive(f *testing.F) {
	m := newImage(f)
	small := func(p []byte) []byte { return bytes.ReplaceAll(p, m.tars[0][1000:90_000], nil) }
	for _, p := range [][]byte{small(m.save()), tarOf(f, entry{name: "manifest.json", body: []byte(`[{"Config":"c","Layers":["a"]}]`)}, entry{name: "c", body: m.configText()})} {
		f.Add(p)
		f.Add(packings["gzip"](f, p))
		f.Add(packings["zstd"](f, p))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		s, _ := in(t, p)
		for i := range m.chains {
			if got, _, err := tarOfLayer(s, m.want(i)); err == nil && digest.FromBytes(got) != m.diffIDs[i] {
				t.Errorf("layer %d has the diff ID %s", i, digest.FromBytes(got))
			}
		}
	})
}

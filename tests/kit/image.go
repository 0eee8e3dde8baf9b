package kit

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime"
	"slices"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is an OCI image to be built. The same image has the same digest on every
// machine.
type Image struct {
	Layers []Layer
	Cmd    []string
}

// Pushed is an image in a registry.
type Pushed struct {
	Ref      string
	Manifest digest.Digest
	Layers   []ocispec.Descriptor
	DiffIDs  []digest.Digest
	ChainIDs []digest.Digest // names of the snapshots, lowest layer first
	Inodes   int             // entries of all layers together
	Bytes    int64           // of all layers together, uncompressed
	// Untimed are the directories, relative to the image's root, whose entries
	// are missing from a layer that puts something into them. Their time is that
	// of the unpacking, and differs between two unpackings of the same image.
	Untimed []string
}

// Top is the name of the snapshot of the whole image.
func (p Pushed) Top() string { return p.ChainIDs[len(p.ChainIDs)-1].String() }

// Push builds the image and pushes it over the registry's HTTP API.
func Push(ctx context.Context, r *Registry, name string, img Image) (Pushed, error) {
	p := Pushed{Ref: r.Ref(name)}
	untimed := map[string]bool{".": true}
	for i, layer := range img.Layers {
		if err := p.pushLayer(ctx, r, name, layer, untimed); err != nil {
			return Pushed{}, fmt.Errorf("push %s: layer %d: %w", name, i, err)
		}
	}
	for dir := range untimed {
		p.Untimed = append(p.Untimed, dir)
	}
	slices.Sort(p.Untimed)
	p.ChainIDs = identity.ChainIDs(slices.Clone(p.DiffIDs))
	if err := p.pushManifest(ctx, r, name, img.Cmd); err != nil {
		return Pushed{}, fmt.Errorf("push %s: %w", name, err)
	}
	return p, nil
}

func (p *Pushed) pushLayer(ctx context.Context, r *Registry, name string, layer Layer, untimed map[string]bool) (err error) {
	f, err := os.CreateTemp("", "layer-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()

	blobHash, diffHash := sha256.New(), sha256.New()
	packed, mediaType, err := compressor(layer.Compression, io.MultiWriter(f, blobHash))
	if err != nil {
		return err
	}
	counter := &counter{inner: layer.entries}
	size := &sizer{}
	if err := (Layer{layer.Compression, counter.entries}).write(io.MultiWriter(packed, diffHash, size), untimed); err != nil {
		return err
	}
	if err := packed.Close(); err != nil {
		return err
	}
	length, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.NewDigest(digest.SHA256, blobHash), Size: length}
	p.Layers = append(p.Layers, desc)
	p.DiffIDs = append(p.DiffIDs, digest.NewDigest(digest.SHA256, diffHash))
	p.Inodes += counter.n
	p.Bytes += size.n
	return putBlob(ctx, r, name, desc, io.NopCloser(f))
}

type counter struct {
	inner func(func(Entry) error) error
	n     int
}

func (c *counter) entries(yield func(Entry) error) error {
	return c.inner(func(e Entry) error { c.n++; return yield(e) })
}

type sizer struct{ n int64 }

func (s *sizer) Write(b []byte) (int, error) { s.n += int64(len(b)); return len(b), nil }

type plainWriter struct{ io.Writer }

func (plainWriter) Close() error { return nil }

// compressor uses the fastest level: the tests are about what comes out.
func compressor(c Compression, w io.Writer) (io.WriteCloser, string, error) {
	switch c {
	case Plain:
		return plainWriter{w}, ocispec.MediaTypeImageLayer, nil
	case Gzip:
		zw, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
		return zw, ocispec.MediaTypeImageLayerGzip, err
	case Zstd:
		// One goroutine, because more of them cut the blocks elsewhere on
		// another machine and change the digest.
		zw, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
		return zw, ocispec.MediaTypeImageLayerZstd, err
	}
	return nil, "", fmt.Errorf("unknown compression %q", c)
}

func (p *Pushed) pushManifest(ctx context.Context, r *Registry, name string, cmd []string) error {
	config := ocispec.Image{
		Created:  &layerTime,
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config:   ocispec.ImageConfig{Cmd: cmd, Env: []string{"PATH=/bin"}},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: p.DiffIDs},
	}
	configDesc, err := putJSON(ctx, r, name, ocispec.MediaTypeImageConfig, config)
	if err != nil {
		return err
	}
	body, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    configDesc,
		Layers:    p.Layers,
	})
	if err != nil {
		return err
	}
	p.Manifest = digest.FromBytes(body)
	url := fmt.Sprintf("http://%s/v2/%s/manifests/latest", r.Host, name)
	_, err = request(ctx, http.MethodPut, url, ocispec.MediaTypeImageManifest, int64(len(body)), bytes.NewReader(body), http.StatusCreated)
	return err
}

func putJSON(ctx context.Context, r *Registry, name, mediaType string, v any) (ocispec.Descriptor, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(body), Size: int64(len(body))}
	return desc, putBlob(ctx, r, name, desc, bytes.NewReader(body))
}

func putBlob(ctx context.Context, r *Registry, name string, desc ocispec.Descriptor, body io.Reader) error {
	start := fmt.Sprintf("http://%s/v2/%s/blobs/uploads/", r.Host, name)
	header, err := request(ctx, http.MethodPost, start, "", 0, nil, http.StatusAccepted)
	if err != nil {
		return err
	}
	// The location already carries a query with the state of the upload.
	location := header.Get("Location") + "&digest=" + desc.Digest.String()
	_, err = request(ctx, http.MethodPut, location, "application/octet-stream", desc.Size, body, http.StatusCreated)
	return err
}

func request(ctx context.Context, method, url, contentType string, size int64, body io.Reader, want int) (http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return nil, err
	}
	req.ContentLength = size
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != want {
		err = fmt.Errorf("%s %s: %s: %s", method, url, resp.Status, text)
	}
	return resp.Header, err
}

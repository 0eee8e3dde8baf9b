package pulls

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Image describes an image that was pulled.
type Image struct {
	Name   string `json:"name"`
	Layers int    `json:"layers"`
	Inodes int    `json:"inodes"` // entries of all layers
	Bytes  int64  `json:"bytes"`  // of the layers, uncompressed
	Packed int64  `json:"packed"` // of the blobs
	// Compression is that of the layers: gzip or zstd.
	Compression string `json:"compression"`
}

// shape is what a layer is made of: files of two sizes, in directories, and one huge file. A
// file has between a quarter of its size and seven quarters.
type shape struct {
	dirs, links  int
	small, large int
	smallBytes   int64
	largeBytes   int64
	hugeBytes    int64
}

const mib = 1 << 20

// imageShapes are the images by name. golang and tensorflow have the sizes, the numbers of
// inodes and, roughly, the layers of the images with which containerd's option to sync after
// an unpack was measured (992 MiB; 1.78 GiB in 32,590 inodes).
var imageShapes = map[string]struct {
	compression kit.Compression
	layers      []shape
}{
	"golang": {kit.Gzip, []shape{
		{dirs: 700, links: 300, small: 3450, smallBytes: 12 << 10, large: 150, largeBytes: 500 << 10},
		{dirs: 60, small: 860, smallBytes: 19 << 10, large: 40, largeBytes: 800 << 10},
		{dirs: 120, small: 640, smallBytes: 14 << 10, large: 60, largeBytes: 900 << 10},
		{dirs: 400, links: 100, small: 2760, smallBytes: 17 << 10, large: 240, largeBytes: 1050 << 10},
		{dirs: 1500, small: 12_600, smallBytes: 9 << 10, large: 60, largeBytes: 2200 << 10},
		{dirs: 3, large: 40, largeBytes: 5500 << 10},
		{dirs: 1, small: 1, smallBytes: 1 << 10},
	}},
	"tensorflow": {kit.Gzip, []shape{
		{dirs: 600, links: 200, small: 2480, smallBytes: 11 << 10, large: 120, largeBytes: 430 << 10},
		{dirs: 900, links: 600, small: 5150, smallBytes: 13 << 10, large: 350, largeBytes: 750 << 10},
		{dirs: 400, small: 2940, smallBytes: 19 << 10, large: 60, largeBytes: 1600 << 10},
		{dirs: 2100, small: 16_200, smallBytes: 14 << 10, large: 300, largeBytes: 1300 << 10, hugeBytes: 640 * mib},
		{dirs: 5, small: 20, smallBytes: 2 << 10},
	}},
	"tiny": {kit.Gzip, slices.Repeat([]shape{{dirs: 1, small: 3, smallBytes: 2 << 10}}, 60)},
	"two":  {kit.Gzip, slices.Repeat([]shape{{dirs: 1, small: 3, smallBytes: 2 << 10}}, 2)}, // for a test
	"zstd": {kit.Zstd, slices.Repeat([]shape{{dirs: 578, links: 77, small: 4500, smallBytes: 6900, large: 198, largeBytes: 455 << 10}}, 4)},
}

// ImageNames are the names of all images.
var ImageNames = []string{"golang", "tensorflow", "tiny", "zstd"}

// imagesVersion is part of the name under which an image is kept: another content needs
// another version.
const imagesVersion = 1

// buildImage makes the image of a name, with a scale-th of its inodes and bytes. Content is made
// while it is written: no image is ever in memory.
func buildImage(name string, scale int) (kit.Image, error) {
	shapes, ok := imageShapes[name]
	if !ok {
		return kit.Image{}, fmt.Errorf("there is no image %q: there are %v", name, ImageNames)
	}
	words := vocabulary()
	img := kit.Image{}
	for i, s := range shapes.layers {
		img.Layers = append(img.Layers, kit.NewLayer(shapes.compression, s.entries(i, scale, words)...))
	}
	return img, nil
}

// entries are the headers of a layer; content is made later. They depend on the number of the
// layer, which is also in their names, and on nothing else.
func (s shape) entries(layer, scale int, words [][]byte) []kit.Entry {
	part := func(n int) int {
		if n == 0 {
			return 0
		}
		return max(1, n/scale)
	}
	dirs, links, small, large := part(s.dirs), part(s.links), part(s.small), part(s.large)
	sizes := rand.New(rand.NewPCG(uint64(layer), 1))
	vary := func(mean int64) int64 { return mean/4 + sizes.Int64N(mean*3/2) }
	top := fmt.Sprintf("usr/lib/layer%02d", layer)
	all := []kit.Entry{kit.Dir("usr", 0o755), kit.Dir("usr/lib", 0o755), kit.Dir(top, 0o755)}
	files := 0
	file := func(dir string, size int64) {
		seed := uint64(files)
		files++
		all = append(all, kit.Generated(fmt.Sprintf("%s/file%d.dat", dir, seed), 0o644, size, func() io.Reader {
			return &text{random: rand.New(rand.NewPCG(uint64(layer), seed+2)), words: words}
		}))
	}
	for d := range dirs {
		dir := fmt.Sprintf("%s/dir%d", top, d)
		if d%7 != 0 {
			dir = fmt.Sprintf("%s/dir%d/sub%d", top, d/7*7, d)
		}
		all = append(all, kit.Dir(dir, 0o755))
		for range share(small, d, dirs) {
			file(dir, vary(s.smallBytes))
		}
		for range share(large, d, dirs) {
			file(dir, vary(s.largeBytes))
		}
		for l := range share(links, d, dirs) {
			all = append(all, kit.Symlink(fmt.Sprintf("%s/link%d", dir, l), "file0.dat"))
		}
	}
	if s.hugeBytes > 0 {
		file(top, s.hugeBytes/int64(scale))
	}
	return all
}

// share is the number of n things that the i-th of parts gets.
func share(n, i, parts int) int { return n*(i+1)/parts - n*i/parts }

// vocabulary is what texts are made of.
func vocabulary() [][]byte {
	r := rand.New(rand.NewPCG(3, 4))
	words := make([][]byte, 1024)
	for i := range words {
		words[i] = make([]byte, 3+r.IntN(9))
		for j := range words[i] {
			words[i][j] = byte('a' + r.IntN(26))
		}
	}
	return words
}

// text is an endless text of words, some more frequent than others, and of random numbers.
// gzip makes about two fifths of it, as of the files of usual images.
type text struct {
	random *rand.Rand
	words  [][]byte
	rest   []byte
	buf    []byte
}

func (t *text) Read(p []byte) (n int, _ error) {
	for n < len(p) {
		if len(t.rest) == 0 {
			t.fill()
		}
		c := copy(p[n:], t.rest)
		n, t.rest = n+c, t.rest[c:]
	}
	return n, nil
}

func (t *text) fill() {
	t.buf = t.buf[:0]
	for len(t.buf) < 4096 {
		if t.random.IntN(16) == 0 {
			t.buf = fmt.Appendf(t.buf, "%016x", t.random.Uint64())
		}
		t.buf = append(append(t.buf, t.words[t.random.IntN(1+t.random.IntN(len(t.words)))]...), ' ')
	}
	t.rest = t.buf
}

// store is a registry whose images stay below a directory from one run to the next.
type store struct {
	registry *kit.Registry
	dir      string
	scale    int
}

func openStore(dir string, scale int) (*store, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("images: %w", err)
	}
	r, err := kit.StartRegistry(filepath.Join(dir, "registry"))
	if err != nil {
		return nil, err
	}
	return &store{registry: r, dir: dir, scale: cmp.Or(scale, 1)}, nil
}

// get returns an image, which is made if it is not there.
func (s *store) get(ctx context.Context, name string) (_ kit.Pushed, err error) {
	known := filepath.Join(s.dir, fmt.Sprintf("%s-%d-v%d.json", name, s.scale, imagesVersion))
	ref := fmt.Sprintf("%s-%d-v%d", name, s.scale, imagesVersion)
	var p kit.Pushed
	text, err := os.ReadFile(known)
	if err == nil {
		err = json.Unmarshal(text, &p)
		p.Ref = s.registry.Ref(ref) // the port is another one each time
		return p, err
	}
	if !errors.Is(err, os.ErrNotExist) {
		return kit.Pushed{}, err
	}
	img, err := buildImage(name, s.scale)
	if err != nil {
		return kit.Pushed{}, err
	}
	if p, err = kit.Push(ctx, s.registry, ref, img); err != nil {
		return kit.Pushed{}, err
	}
	p.Untimed = nil
	if text, err = json.Marshal(p); err == nil {
		err = os.WriteFile(known+".new", text, 0o644)
	}
	if err == nil {
		err = os.Rename(known+".new", known)
	}
	return p, err
}

// warm reads the blobs of an image, so that a pull does not wait for the registry's disk.
func (s *store) warm(p kit.Pushed) error {
	for _, l := range p.Layers {
		f, err := os.Open(s.registry.Blob(l.Digest))
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, f)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

func describe(name string, p kit.Pushed) Image {
	i := Image{Name: name, Layers: len(p.Layers), Inodes: p.Inodes, Bytes: p.Bytes, Compression: string(imageShapes[name].compression)}
	for _, l := range p.Layers {
		i.Packed += l.Size
	}
	return i
}

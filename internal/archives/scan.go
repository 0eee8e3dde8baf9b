package archives

import (
	"archive/tar"
	"bytes"
	"compress/bzip2"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/durable-snapshotter/durable-snapshotter/internal/blobs"
	"github.com/durable-snapshotter/durable-snapshotter/internal/inflate"
)

// Bounds of what is kept of one archive while it is read, and of what it may unpack to. An
// archive with every image of a large node has some hundred documents of some kilobytes.
const (
	maxEntries   = 1 << 16
	maxNames     = 16 << 20 // bytes of all names together
	maxDocument  = 8 << 20  // as of a blob in the content store, see package blobs
	maxDocuments = 64 << 20
	maxLinks     = 8 // that lead from a name to a file
	sniffed      = 64
)

// unpacked is how many bytes a compressed archive of a size may hold: tars of programs
// do not get smaller than a fiftieth, and a bomb does not matter before this.
func unpacked(size int64) int64 { return 1<<30 + 200*size }

// reader is an archive's tar.
type reader interface {
	io.Reader
	io.Closer
}

// tracked reads a file until ctx ends, and keeps the error that this has met. Whatever else
// fails is the archive's fault.
type tracked struct {
	ctx    context.Context
	file   *os.File
	failed error
}

func (t *tracked) Read(p []byte) (int, error) {
	n, err := 0, t.ctx.Err()
	if err == nil {
		n, err = t.file.Read(p)
	}
	return n, t.keep(err)
}

// Seek is for the tar reader, which skips the content of entries by it. It reads nothing: its
// error is that of an offset, which comes from the archive.
func (t *tracked) Seek(offset int64, whence int) (int64, error) { return t.file.Seek(offset, whence) }

func (t *tracked) keep(err error) error {
	if err != nil && err != io.EOF && t.failed == nil {
		t.failed = err
	}
	return err
}

// fault gives an error of reading an archive its kind.
func (t *tracked) fault(err error, what string) error {
	if t.failed != nil {
		return blobs.Problem(blobs.ErrCannot, t.failed, "read %s", what)
	}
	return blobs.Problem(blobs.ErrCorrupt, err, "%s is cut short or damaged", what)
}

// packing finds out how an archive is compressed.
func packing(f *os.File) (func(*tracked) (reader, error), error) {
	head := make([]byte, 10)
	n, err := f.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	head = head[:n]
	decompress := func(t *tracked) (reader, error) {
		r, err := inflate.Stream(io.MultiReader(t)) // which hides Seek
		return limit(r, t.file, err)
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}), bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}),
		len(head) > 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:4], []byte{0x2a, 0x4d, 0x18}): // zstd, too: a frame to skip
		return decompress, nil
	case bytes.HasPrefix(head, []byte("BZh")):
		return func(t *tracked) (reader, error) { return limit(io.NopCloser(bzip2.NewReader(t)), t.file, nil) }, nil
	case bytes.HasPrefix(head, []byte{0x04, 0x22, 0x4d, 0x18}):
		return nil, errors.New("it is compressed with lz4; use gzip, zstd or bzip2")
	case bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return nil, errors.New("it is compressed with xz; use gzip, zstd or bzip2")
	}
	return nil, nil
}

// limited ends what unpacks to more than an archive of its size can hold.
type limited struct {
	io.ReadCloser
	left int64
}

func limit(r io.ReadCloser, f *os.File, err error) (reader, error) {
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return &limited{r, unpacked(info.Size())}, nil
}

func (l *limited) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, errors.New("it unpacks to more than an archive of its size can hold")
	}
	n, err := l.ReadCloser.Read(p[:min(int64(len(p)), l.left)])
	l.left -= int64(n)
	return n, err
}

// contents is what was read of an archive so far.
type contents struct {
	files map[string]member
	links map[string]string
	texts map[string][]byte // that may be JSON
	names int               // bytes
	bytes int               // of texts
}

// scan reads an archive. What is no archive has no layers, and no flaw. The error is that
// of opening it, with a kind.
func scan(ctx context.Context, file string) (*archive, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, blobs.Problem(blobs.ErrCannot, err, "open image archive")
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, blobs.Problem(blobs.ErrCannot, err, "open image archive")
	}
	a := &archive{path: file, id: idOf(info), proven: map[proof]error{}}
	if a.packed, err = packing(f); err != nil {
		a.flaw = blobs.Problem(blobs.ErrCannot, err, "image archive %s", file)
		return a, nil
	}
	t := &tracked{ctx: ctx, file: f}
	c := &contents{files: map[string]member{}, links: map[string]string{}, texts: map[string][]byte{}}
	if err := c.read(t, a.packed); errors.Is(err, errTooMuch) {
		a.flaw = blobs.Problem(blobs.ErrCannot, err, "image archive %s", file)
	} else if err != nil {
		if a.flaw = t.fault(err, file); len(c.files) == 0 && t.failed == nil {
			a.flaw = nil // some other file
		}
	}
	if t.failed != nil {
		return nil, a.flaw // again the next time
	}
	a.locate(c)
	return a, nil
}

// errTooMuch: more than is kept of an archive. What it holds is not known then.
var errTooMuch = errors.New("it has more entries or documents than an image archive")

// read reads the tar to its end. After an error there is what came before it.
func (c *contents) read(t *tracked, packed func(*tracked) (reader, error)) error {
	var src io.Reader = t
	if packed != nil {
		r, err := packed(t)
		if err != nil {
			return err
		}
		defer r.Close()
		src = r
	}
	tr := tar.NewReader(src)
	for number := 0; ; number++ {
		h, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if number == maxEntries {
			return errTooMuch
		}
		m := member{number: number, size: h.Size}
		if packed == nil {
			if m.offset, err = t.Seek(0, io.SeekCurrent); err != nil {
				return err
			}
		}
		if err := c.add(h, m, tr); err != nil {
			return err
		}
	}
}

// add notes an entry.
func (c *contents) add(h *tar.Header, m member, content io.Reader) error {
	m.name = clean(h.Name)
	if c.names += len(h.Name) + len(h.Linkname); c.names > maxNames {
		return errTooMuch
	}
	// The last entry of a name counts.
	delete(c.files, m.name)
	delete(c.links, m.name)
	delete(c.texts, m.name)
	switch h.Typeflag {
	case tar.TypeSymlink:
		c.links[m.name] = clean(path.Join(path.Dir(m.name), h.Linkname))
		return nil
	case tar.TypeLink:
		c.links[m.name] = clean(h.Linkname)
		return nil
	case tar.TypeReg:
	default:
		return nil
	}
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return nil // its content is not what lies in the archive
		}
	}
	c.files[m.name] = m
	if h.Size == 0 || h.Size > maxDocument {
		return nil
	}
	head := make([]byte, min(sniffed, h.Size))
	if _, err := io.ReadFull(content, head); err != nil {
		return err
	}
	if trimmed := bytes.TrimLeft(head, " \t\r\n"); len(trimmed) == 0 || trimmed[0] != '{' && trimmed[0] != '[' {
		return nil
	}
	if c.bytes += int(h.Size); c.bytes > maxDocuments {
		return errTooMuch
	}
	text, err := io.ReadAll(io.MultiReader(bytes.NewReader(head), content))
	if err != nil {
		return err
	}
	c.texts[m.name] = text
	return nil
}

// clean makes names comparable, whatever leads out of the archive included.
func clean(name string) string { return path.Clean("/" + name)[1:] }

// file returns the file that a name stands for, through links.
func (c *contents) file(name string) (m member, ok bool) {
	name = clean(name)
	for range maxLinks {
		if m, ok = c.files[name]; ok {
			return m, true
		}
		if name, ok = c.links[name]; !ok {
			return m, false
		}
	}
	return m, false
}

// blobsDir is where an OCI archive has its blobs.
const blobsDir = "blobs/"

// digestOf returns the digest that a file in an archive has by its name, "" when its name is none.
func digestOf(name string) digest.Digest {
	rest, ok := strings.CutPrefix(name, blobsDir)
	algorithm, encoded, ok2 := strings.Cut(rest, "/")
	d := digest.NewDigestFromEncoded(digest.Algorithm(algorithm), encoded)
	if !ok || !ok2 || d.Validate() != nil {
		return ""
	}
	return d
}

// locate finds the layers by what the documents have of them.
func (a *archive) locate(c *contents) {
	a.layers, a.chains = map[digest.Digest][]member{}, map[digest.Digest]digest.Digest{}
	for name, text := range c.texts {
		d := digestOf(name)
		if d == "" || d.Algorithm().FromBytes(text) != d {
			continue
		}
		config, layers, ok := blobs.Manifest(text)
		if !ok {
			continue
		}
		doc := c.texts[blobsDir+config.Algorithm().String()+"/"+config.Encoded()]
		if config.Algorithm().FromBytes(doc) != config {
			continue
		}
		var members []member
		for _, l := range layers {
			m, ok := c.file(blobsDir + l.Digest.Algorithm().String() + "/" + l.Digest.Encoded())
			if ok = ok && m.size == l.Size; ok {
				m.digest, m.media = l.Digest, l.MediaType
			}
			members = append(members, m)
		}
		a.add(doc, members)
	}
	var docker []struct {
		Config string
		Layers []string
	}
	if json.Unmarshal(c.texts["manifest.json"], &docker) != nil {
		return
	}
	for _, image := range docker {
		var members []member
		for _, l := range image.Layers {
			m, ok := c.file(l)
			if ok {
				m.digest, m.media = digestOf(m.name), ocispec.MediaTypeImageLayer
			}
			members = append(members, m)
		}
		config, _ := c.file(image.Config)
		a.add(c.texts[config.name], members)
	}
}

// add notes the layers of an image. Those that the archive does not have have no media type.
func (a *archive) add(config []byte, members []member) {
	ids, ok, err := blobs.Config(config)
	if !ok || err != nil || len(ids) != len(members) {
		return
	}
	chains := identity.ChainIDs(slices.Clone(ids))
	for i, m := range members {
		a.chains[chains[i]] = ids[i]
		has := slices.ContainsFunc(a.layers[ids[i]], func(o member) bool { return o.number == m.number })
		if m.media != "" && !has {
			a.layers[ids[i]] = append(a.layers[ids[i]], m)
		}
	}
}

func (m member) descriptor() ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: m.media, Digest: m.digest, Size: m.size}
}

// origin is a member as package blobs reads it.
type origin struct {
	*archive
	member
}

// Open is for [blobs.Origin].
func (o origin) Open(ctx context.Context, _ blobs.Blob) (_ io.ReadCloser, err error) {
	f, err := os.Open(o.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, blobs.Problem(blobs.ErrNotFound, err, "open image archive")
	}
	if err != nil {
		return nil, blobs.Problem(blobs.ErrCannot, err, "open image archive")
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return nil, blobs.Problem(blobs.ErrCannot, err, "open image archive")
	}
	if idOf(info) != o.id {
		return nil, blobs.Problem(blobs.ErrCannot, errors.New("it has changed since it was read"), "image archive %s", o.path)
	}
	s := &stream{what: fmt.Sprintf("%s in %s", o.name, o.path), left: o.size, tracked: &tracked{ctx: ctx, file: f}}
	if o.packed == nil {
		if _, err := s.tracked.Seek(o.offset, io.SeekStart); err != nil {
			return nil, s.fault(err, s.what)
		}
		s.content = s.tracked
		return s, nil
	}
	if s.unpacked, err = o.packed(s.tracked); err != nil {
		return nil, s.fault(err, s.what)
	}
	tr := tar.NewReader(s.unpacked)
	for range o.number + 1 {
		if _, err := tr.Next(); err != nil {
			s.unpacked.Close()
			return nil, s.fault(err, s.what)
		}
	}
	s.content = tr
	return s, nil
}

// stream is the content of a member.
type stream struct {
	*tracked
	what     string
	content  io.Reader
	unpacked reader // nil when it is not compressed
	left     int64
}

func (s *stream) Read(p []byte) (int, error) {
	if s.left == 0 {
		return 0, io.EOF
	}
	n, err := s.content.Read(p[:min(int64(len(p)), s.left)])
	if s.left -= int64(n); err == io.EOF {
		if err = nil; s.left > 0 {
			err = io.ErrUnexpectedEOF
		}
	}
	if err != nil {
		err = s.fault(err, s.what)
	}
	return n, err
}

func (s *stream) Close() error {
	if s.unpacked != nil {
		s.unpacked.Close()
	}
	return s.file.Close()
}

// Remember is for [blobs.Origin].
func (o origin) Remember(b blobs.Blob, result error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.proven[proof{o.number, b.DiffID}] = result
}

// Remembered is for [blobs.Origin].
func (o origin) Remembered(b blobs.Blob) (known bool, result error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	result, known = o.proven[proof{o.number, b.DiffID}]
	return known, result
}

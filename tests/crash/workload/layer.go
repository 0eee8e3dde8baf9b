package workload

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"path"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// Layer is one layer of a chain.
type Layer struct {
	Name    string // committed name, in the form of containerd's back end
	Parent  string // committed name, empty for the lowest
	ChainID string
	DiffID  digest.Digest
	Tar     []byte
	Late    bool // something is written to it after its tar was applied
}

// builder writes the tar of a layer. Everything in it comes from the random
// stream, so that the same seed makes the same layer.
type builder struct {
	*rand.Rand
	tar *tar.Writer
	err error
}

// modTime has nanoseconds: a file system that lost them lost something.
var modTime = time.Unix(1_700_000_000, 123_456_789)

func (b *builder) add(h tar.Header, content []byte) {
	h.ModTime = modTime.Add(time.Duration(b.IntN(1_000_000_000)))
	h.Format = tar.FormatPAX
	h.Size = int64(len(content))
	if b.err == nil {
		b.err = b.tar.WriteHeader(&h)
	}
	if b.err == nil {
		_, b.err = b.tar.Write(content)
	}
}

func (b *builder) dir(name string, mode int64) {
	b.add(tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}, nil)
}

func (b *builder) file(name string, mode int64, size int) {
	b.add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}, b.bytes(size))
}

func (b *builder) link(kind byte, name, target string) {
	b.add(tar.Header{Typeflag: kind, Name: name, Linkname: target, Mode: 0o777}, nil)
}

// whiteout removes a name of the layers below.
func (b *builder) whiteout(name string) {
	b.add(tar.Header{Typeflag: tar.TypeReg, Name: path.Join(path.Dir(name), ".wh."+path.Base(name))}, nil)
}

// opaque hides what the layers below have in the directory.
func (b *builder) opaque(dir string) {
	b.add(tar.Header{Typeflag: tar.TypeReg, Name: path.Join(dir, ".wh..wh..opq")}, nil)
}

// bytes that no file system can compress, and no two blocks of which are equal.
func (b *builder) bytes(n int) []byte {
	out := make([]byte, 0, n+8)
	for len(out) < n {
		out = binary.LittleEndian.AppendUint64(out, b.Uint64())
	}
	return out[:n]
}

// small is the size of most files in an image: below a block, now and then a
// few blocks.
func (b *builder) small() int {
	if b.IntN(4) == 0 {
		return 4096 + b.IntN(12<<10)
	}
	return b.IntN(3000)
}

// build makes layer number depth of a chain.
func build(r *rand.Rand, depth int) ([]byte, error) {
	var out bytes.Buffer
	b := &builder{Rand: r, tar: tar.NewWriter(&out)}
	if depth == 0 {
		b.base()
	} else {
		b.upper(depth)
	}
	if b.err == nil {
		b.err = b.tar.Close()
	}
	if b.err != nil {
		return nil, fmt.Errorf("build layer %d: %w", depth, b.err)
	}
	return out.Bytes(), nil
}

// base has every kind of entry, and what the layers above take away.
func (b *builder) base() {
	for _, d := range []string{"bin", "etc", "usr", "usr/lib", "usr/gone", "data", "empty"} {
		b.dir(d, 0o755)
	}
	b.dir("tmp", 0o1777)
	b.add(tar.Header{Typeflag: tar.TypeDir, Name: "home/", Mode: 0o2750, Uid: 1234, Gid: 4_000_000,
		PAXRecords: map[string]string{"SCHILY.xattr.user.kind": "directory"}}, nil)
	for i := range 4 {
		b.file(fmt.Sprintf("etc/conf%d", i), 0o644, b.small())
		b.file(fmt.Sprintf("usr/lib/lib%d.so", i), 0o755, b.small())
		b.file(fmt.Sprintf("usr/gone/file%d", i), 0o600, b.small())
	}
	b.file("data/large", 0o644, 150_000+b.IntN(200_000))
	b.file("data/none", 0o000, 0)
	b.link(tar.TypeLink, "data/large.again", "data/large")
	b.link(tar.TypeSymlink, "bin/short", "../usr/lib/lib0.so")
	b.link(tar.TypeSymlink, "bin/long", "/"+string(bytes.Repeat([]byte("very/"), 60))+"long")
	b.file("bin/setuid", 0o4755, b.small())
	b.file("bin/setgid", 0o2755, b.small())
	b.add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/capable", Mode: 0o755,
		PAXRecords: map[string]string{"SCHILY.xattr.security.capability": kit.Capability(1 << 10)}}, b.bytes(b.small()))
	b.add(tar.Header{Typeflag: tar.TypeReg, Name: "home/owned", Mode: 0o640, Uid: 4_000_001, Gid: 77,
		PAXRecords: map[string]string{"SCHILY.xattr.user.long": string(bytes.Repeat([]byte("x"), 500))}}, b.bytes(b.small()))
	b.add(tar.Header{Typeflag: tar.TypeFifo, Name: "tmp/pipe", Mode: 0o622}, nil)
	b.add(tar.Header{Typeflag: tar.TypeChar, Name: "tmp/device", Mode: 0o666, Devmajor: 1, Devminor: 3}, nil)
	b.file("etc/ odd \n\"name\"", 0o644, b.small())
	b.file("etc/日本", 0o644, b.small())
}

// upper changes the layers below in every way there is, and adds its own.
func (b *builder) upper(depth int) {
	own := fmt.Sprintf("layer%d", depth)
	b.dir(own, 0o755)
	for i := range 5 + b.IntN(5) {
		b.file(fmt.Sprintf("%s/file%d", own, i), 0o644, b.small())
	}
	b.link(tar.TypeLink, own+"/again", own+"/file0")
	b.link(tar.TypeSymlink, own+"/there", "../data/large")
	b.add(tar.Header{Typeflag: tar.TypeReg, Name: own + "/capable", Mode: 0o755,
		PAXRecords: map[string]string{"SCHILY.xattr.security.capability": kit.Capability(1 << 13)}}, b.bytes(b.small()))
	b.dir("etc", 0o755)
	b.file("etc/conf0", 0o600, b.small())
	b.whiteout(fmt.Sprintf("etc/conf%d", 1+b.IntN(3)))
	switch depth % 3 {
	case 0:
		b.dir("usr", 0o755)
		b.dir("usr/lib", 0o711)
		b.opaque("usr/lib")
		b.file("usr/lib/only", 0o755, b.small())
	case 1:
		b.dir("usr", 0o755)
		b.whiteout("usr/gone")
		b.file("data", 0o644, b.small()) // a file where a directory was
	case 2:
		b.dir("data", 0o700)
		b.file("data/blob", 0o644, 60_000+b.IntN(60_000))
		b.add(tar.Header{Typeflag: tar.TypeChar, Name: own + "/device", Mode: 0o600, Devmajor: 240, Devminor: 200_000}, nil)
	}
}

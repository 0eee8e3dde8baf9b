package overlay

import (
	"archive/tar"
	"bytes"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// image is a list of layers, lowest first.
type image []layer

// layer is a list of entries in the order of the tar.
type layer []entry

type kind string

const (
	dir      kind = "dir"
	file     kind = "file"
	symlink  kind = "symlink"
	hardlink kind = "hardlink"
	char     kind = "char"
	block    kind = "block"
	fifo     kind = "fifo"
	whiteout kind = "whiteout" // removes path from the layers below
	opaque   kind = "opaque"   // removes what the layers below have in path
)

// entry is one entry of a tar. The path is clean and relative, "." is the root.
type entry struct {
	kind         kind
	path         string
	spelt        string // how the tar writes the path, if not as usual
	target       string // of a symlink, or of a hardlink: a path
	body         string
	mode         int64 // permissions, setuid, setgid and sticky, as in tar
	uid, gid     int
	major, minor int64
	mtime        time.Time
	xattrs       map[string]string
}

// marker reports whether the entry concerns the layers below rather
// than adding something.
func (e entry) marker() bool { return e.kind == whiteout || e.kind == opaque }

// name is the name in the tar.
func (e entry) name() string {
	switch {
	case e.spelt != "":
		return e.spelt
	case e.kind == whiteout:
		return path.Join(path.Dir(e.path), ".wh."+path.Base(e.path))
	case e.kind == opaque:
		return path.Join(e.path, ".wh..wh..opq")
	case e.kind == dir:
		return e.path + "/"
	}
	return e.path
}

var typeflags = map[kind]byte{
	dir: tar.TypeDir, file: tar.TypeReg, whiteout: tar.TypeReg, opaque: tar.TypeReg, symlink: tar.TypeSymlink,
	hardlink: tar.TypeLink, char: tar.TypeChar, block: tar.TypeBlock, fifo: tar.TypeFifo,
}

func (e entry) header() tar.Header {
	h := tar.Header{
		Typeflag: typeflags[e.kind], Name: e.name(), Linkname: e.target, Mode: e.mode, Uid: e.uid, Gid: e.gid,
		Devmajor: e.major, Devminor: e.minor, ModTime: e.mtime, Size: int64(len(e.body)), Format: tar.FormatPAX,
	}
	if len(e.xattrs) > 0 {
		h.PAXRecords = map[string]string{}
		for k, v := range e.xattrs {
			h.PAXRecords["SCHILY.xattr."+k] = v
		}
	}
	return h
}

// tar writes the layer.
func (l layer) tar() ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range l {
		h := e.header()
		if err := w.WriteHeader(&h); err != nil {
			return nil, fmt.Errorf("tar of %v: %w", e, err)
		}
		if _, err := w.Write([]byte(e.body)); err != nil {
			return nil, fmt.Errorf("tar of %v: %w", e, err)
		}
	}
	err := w.Close()
	return out.Bytes(), err
}

// kit is the same image for a registry.
func (img image) kit() kit.Image {
	var out kit.Image
	for _, l := range img {
		var entries []kit.Entry
		for _, e := range l {
			k := kit.File("x", 0, e.body)
			k.Header = e.header()
			entries = append(entries, k)
		}
		out.Layers = append(out.Layers, kit.NewLayer(kit.Gzip, entries...))
	}
	return out
}

// String is one line of a listing: what matters, with names quoted, and
// attributes only where they are not the usual ones.
func (e entry) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-8s %q", e.kind, e.path)
	if e.spelt != "" {
		fmt.Fprintf(&b, " as %q", e.spelt)
	}
	if e.target != "" {
		fmt.Fprintf(&b, " -> %q", e.target)
	}
	if e.marker() {
		return b.String()
	}
	if e.mode != 0o755 && e.kind == dir || e.mode != 0o644 && e.kind != dir && e.kind != symlink {
		fmt.Fprintf(&b, " mode=%04o", e.mode)
	}
	if e.uid != 0 || e.gid != 0 {
		fmt.Fprintf(&b, " owner=%d:%d", e.uid, e.gid)
	}
	if e.kind == char || e.kind == block {
		fmt.Fprintf(&b, " device=%d:%d", e.major, e.minor)
	}
	if e.body != "" {
		fmt.Fprintf(&b, " body=%.20q", e.body)
	}
	if !e.mtime.Equal(usualTime) {
		fmt.Fprintf(&b, " mtime=%s", e.mtime.UTC().Format(time.RFC3339Nano))
	}
	for _, k := range slices.Sorted(maps.Keys(e.xattrs)) {
		fmt.Fprintf(&b, " %s=%.20q", k, e.xattrs[k])
	}
	return b.String()
}

// String is a listing of the image, as it is printed for a failure.
func (img image) String() string {
	var b strings.Builder
	for i, l := range img {
		fmt.Fprintf(&b, "layer %d\n", i+1)
		for _, e := range l {
			fmt.Fprintf(&b, "    %v\n", e)
		}
	}
	return b.String()
}

func (img image) clone() image {
	out := make(image, len(img))
	for i, l := range img {
		out[i] = slices.Clone(l)
	}
	return out
}

// usualTime is the modification time of hand-made entries. It has nanoseconds,
// because a time cut to seconds is a difference too.
var usualTime = time.Unix(1_700_000_000, 123_456_789)

// The constructors below are for images written by hand; with changes a copy.

func mkdir(p string) entry { return entry{kind: dir, path: p, mode: 0o755, mtime: usualTime} }
func mkfile(p string) entry {
	return entry{kind: file, path: p, mode: 0o644, mtime: usualTime, body: "content of " + p}
}
func mklink(p, target string) entry {
	return entry{kind: hardlink, path: p, target: target, mode: 0o644, mtime: usualTime}
}
func mksymlink(p, target string) entry {
	return entry{kind: symlink, path: p, target: target, mode: 0o777, mtime: usualTime}
}
func rm(p string) entry    { return entry{kind: whiteout, path: p, mtime: usualTime} }
func empty(p string) entry { return entry{kind: opaque, path: p, mtime: usualTime} }

func (e entry) with(change func(*entry)) entry {
	e.xattrs = maps.Clone(e.xattrs)
	change(&e)
	return e
}

func (e entry) withMode(mode int64) entry { return e.with(func(e *entry) { e.mode = mode }) }
func (e entry) withOwner(uid, gid int) entry {
	return e.with(func(e *entry) { e.uid, e.gid = uid, gid })
}
func (e entry) withXattr(name, value string) entry {
	return e.with(func(e *entry) {
		if e.xattrs == nil {
			e.xattrs = map[string]string{}
		}
		e.xattrs[name] = value
	})
}
func (e entry) withTime(t time.Time) entry { return e.with(func(e *entry) { e.mtime = t }) }

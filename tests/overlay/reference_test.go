package overlay

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// The reference: what an image means, from the OCI image specification
// (image-spec v1.1, layer.md, "Applying Changesets" and "Whiteouts") alone.
//
// Where the specification is silent it takes the reading that containerd,
// umoci and containers/storage share: a directory that no layer has an entry
// for is 0755 root:root; a marker implies the directory it lies in; a parent
// that is no directory, a symbolic link included, gives way to a directory.

// inode is a file of the reference. Hardlinks are names of one inode.
type inode struct {
	kit.Inode
	names map[string]*inode // of a directory, nil for everything else
}

func newDirectory() *inode {
	return &inode{Inode: kit.Inode{Mode: fs.ModeDir | 0o755}, names: map[string]*inode{}}
}

// reference applies the layers of an image, lowest first.
func reference(img image) *inode {
	root := newDirectory()
	for _, l := range img {
		root.apply(l)
	}
	return root
}

func (root *inode) apply(l layer) {
	// "A whiteout file MUST only apply to resources in lower/parent layers": so
	// all of them come first, wherever the tar has them.
	for _, e := range l {
		switch e.kind {
		case whiteout:
			if d := root.find(path.Dir(e.path)); d != nil {
				delete(d.names, path.Base(e.path))
			}
		case opaque:
			if d := root.find(e.path); d != nil {
				clear(d.names)
			}
		}
	}
	for _, e := range l {
		switch e.kind {
		case whiteout:
			root.directory(path.Dir(e.path))
		case opaque:
			root.directory(e.path)
		default:
			root.add(e)
		}
	}
	// The content of a directory may come after its entry, and changes its time.
	for _, e := range l {
		if e.kind == dir {
			root.find(e.path).Mtime = e.mtime
		}
	}
}

// add puts an entry into the tree. "If the entry and the existing path are both
// directories, then the existing path's attributes MUST be replaced"; in all
// other cases the existing path is removed first. A hardlink is one more name,
// and changes nothing else.
func (root *inode) add(e entry) {
	if e.path == "." {
		root.set(e)
		return
	}
	parent, base := root.directory(path.Dir(e.path)), path.Base(e.path)
	n := parent.names[base]
	switch {
	case e.kind == hardlink:
		parent.names[base] = root.find(path.Dir(e.target)).names[path.Base(e.target)]
		return
	case e.kind != dir:
		n = &inode{}
	case n == nil || n.names == nil:
		n = newDirectory()
	}
	n.set(e)
	parent.names[base] = n
}

var types = map[kind]fs.FileMode{
	dir: fs.ModeDir, symlink: fs.ModeSymlink, fifo: fs.ModeNamedPipe,
	block: fs.ModeDevice, char: fs.ModeDevice | fs.ModeCharDevice,
}

func (n *inode) set(e entry) {
	n.Mode = types[e.kind] | fs.FileMode(e.mode)&fs.ModePerm
	for bit, mode := range map[int64]fs.FileMode{unix.S_ISUID: fs.ModeSetuid, unix.S_ISGID: fs.ModeSetgid, unix.S_ISVTX: fs.ModeSticky} {
		if e.mode&bit != 0 {
			n.Mode |= mode
		}
	}
	if e.kind == symlink {
		n.Mode = fs.ModeSymlink | 0o777 // Linux has no other
	}
	n.Uid, n.Gid, n.Mtime = uint32(e.uid), uint32(e.gid), e.mtime
	var pairs []string
	for _, k := range slices.Sorted(maps.Keys(e.xattrs)) {
		pairs = append(pairs, fmt.Sprintf("%s=%q", k, e.xattrs[k]))
	}
	n.Xattrs = strings.Join(pairs, " ")
	switch e.kind {
	case file:
		n.Size, n.Sum = int64(len(e.body)), fmt.Sprintf("%x", sha256.Sum256([]byte(e.body)))
	case symlink:
		n.Target = e.target
	case char, block:
		n.Rdev = unix.Mkdev(uint32(e.major), uint32(e.minor))
	}
}

// find returns a directory, or nil when the path is none.
func (root *inode) find(name string) *inode {
	n := root
	for _, part := range parts(name) {
		if n = n.names[part]; n == nil || n.names == nil {
			return nil
		}
	}
	return n
}

// directory returns a directory that something of the layer lies in, and makes
// it if it has to. Its time is no longer known: a tar does not have it.
func (root *inode) directory(name string) *inode {
	n := root
	n.Mtime = time.Time{}
	for _, part := range parts(name) {
		next := n.names[part]
		if next == nil || next.names == nil {
			next = newDirectory()
			n.names[part] = next
		}
		n = next
		n.Mtime = time.Time{}
	}
	return n
}

func parts(name string) []string {
	if name == "." {
		return nil
	}
	return strings.Split(name, "/")
}

// view is what is compared: a fingerprint, and which names are hardlinks of
// each other.
type view struct {
	kit.Tree
	links map[string]string // name to the first name of the same inode
}

// view lists the tree. The link count of a file counts the names that can be
// seen: the kernel's also counts those that upper layers hide.
func (root *inode) view() view {
	v := view{kit.Tree{}, map[string]string{}}
	names := map[*inode][]string{}
	var list func(name string, n *inode)
	list = func(name string, n *inode) {
		v.Tree[name] = n.Inode
		if n.names == nil {
			names[n] = append(names[n], name)
		}
		for _, base := range slices.Sorted(maps.Keys(n.names)) {
			list(path.Join(name, base), n.names[base])
		}
	}
	list(".", root)
	for _, same := range names {
		v.link(same)
	}
	return v
}

// link notes that names are those of one inode.
func (v view) link(names []string) {
	slices.Sort(names)
	for _, name := range names {
		n := v.Tree[name]
		n.Nlink = uint64(len(names))
		v.Tree[name] = n
		v.links[name] = names[0]
	}
}

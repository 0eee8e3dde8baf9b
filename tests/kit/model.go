package kit

import (
	"archive/tar"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Model computes what a container sees of the image from its tars alone, as the
// OCI image specification (layer.md, "Applying Changesets") has it: the tree, and
// which names are hardlinks of each other, see [Links]. Directories whose time no
// tar gives have none. tests/overlay has a reference of its own that knows every
// oddity of a tar; this one is for the layers that package kit can make, with
// clean paths and hardlinks to names of the same layer.
func (img Image) Model() (Tree, map[string]string, error) {
	root := newModelDir()
	untimed := map[string]bool{".": true}
	for i, layer := range img.Layers {
		var all []Entry
		if err := layer.entries(func(e Entry) error { all = append(all, e); return nil }); err != nil {
			return nil, nil, fmt.Errorf("model of layer %d: %w", i, err)
		}
		if err := root.apply(all); err != nil {
			return nil, nil, fmt.Errorf("model of layer %d: %w", i, err)
		}
		noteUntimed(all, untimed)
	}
	t, links := Tree{}, map[string]string{}
	names := map[*modelInode][]string{}
	root.list(".", t, names)
	for _, same := range names {
		slices.Sort(same)
		for _, name := range same {
			n := t[name]
			n.Nlink = uint64(len(same))
			t[name] = n
			if len(same) > 1 {
				links[name] = same[0]
			}
		}
	}
	t.Untime(slices.Collect(maps.Keys(untimed))...)
	return t, links, nil
}

// modelInode is an inode of the model. Hardlinks are names of one.
type modelInode struct {
	Inode
	names map[string]*modelInode // of a directory, nil for everything else
}

func newModelDir() *modelInode {
	return &modelInode{Inode: Inode{Mode: fs.ModeDir | 0o755}, names: map[string]*modelInode{}}
}

const (
	whiteoutPrefix = ".wh."
	opaqueName     = ".wh..wh..opq"
)

// apply applies one layer: first what it removes from the layers below.
func (root *modelInode) apply(all []Entry) error {
	for _, e := range all {
		dir, base := path.Split(path.Clean(e.Name))
		if base == opaqueName {
			clear(root.directory(dir).names)
		} else if name, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
			delete(root.directory(dir).names, name)
		}
	}
	for _, e := range all {
		if strings.HasPrefix(path.Base(e.Name), whiteoutPrefix) {
			continue
		}
		if err := root.add(e); err != nil {
			return fmt.Errorf("entry %q: %w", e.Name, err)
		}
	}
	return nil
}

// directory returns a directory, and makes it if it has to.
func (root *modelInode) directory(name string) *modelInode {
	n := root
	for _, part := range strings.FieldsFunc(path.Clean(name), func(r rune) bool { return r == '/' }) {
		if part == "." {
			continue
		}
		next := n.names[part]
		if next == nil || next.names == nil {
			next = newModelDir()
			n.names[part] = next
		}
		n = next
	}
	return n
}

func (root *modelInode) add(e Entry) error {
	name := path.Clean(e.Name)
	parent, base := root.directory(path.Dir(name)), path.Base(name)
	n := parent.names[base]
	switch {
	case e.Typeflag == tar.TypeLink:
		target := path.Clean(e.Linkname)
		if n = root.directory(path.Dir(target)).names[path.Base(target)]; n == nil {
			return fmt.Errorf("hardlink to %q, which is not there", e.Linkname)
		}
		parent.names[base] = n
		return nil
	case e.Typeflag != tar.TypeDir:
		n = &modelInode{}
	case n == nil || n.names == nil:
		n = newModelDir()
	}
	parent.names[base] = n
	return n.set(e)
}

var modelTypes = map[byte]fs.FileMode{
	tar.TypeDir: fs.ModeDir, tar.TypeSymlink: fs.ModeSymlink, tar.TypeFifo: fs.ModeNamedPipe,
	tar.TypeBlock: fs.ModeDevice, tar.TypeChar: fs.ModeDevice | fs.ModeCharDevice,
}

func (n *modelInode) set(e Entry) error {
	n.Mode = modelTypes[e.Typeflag] | fs.FileMode(e.Mode)&fs.ModePerm
	for bit, mode := range map[int64]fs.FileMode{unix.S_ISUID: fs.ModeSetuid, unix.S_ISGID: fs.ModeSetgid, unix.S_ISVTX: fs.ModeSticky} {
		if e.Mode&bit != 0 {
			n.Mode |= mode
		}
	}
	n.Uid, n.Gid, n.Mtime = uint32(e.Uid), uint32(e.Gid), e.ModTime
	var pairs []string
	for _, k := range slices.Sorted(maps.Keys(e.PAXRecords)) {
		if attr, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
			pairs = append(pairs, fmt.Sprintf("%s=%q", attr, e.PAXRecords[k]))
		}
	}
	n.Xattrs = strings.Join(pairs, " ")
	switch e.Typeflag {
	case tar.TypeSymlink:
		n.Mode, n.Target = fs.ModeSymlink|0o777, e.Linkname // Linux has no other mode
	case tar.TypeChar, tar.TypeBlock:
		n.Rdev = unix.Mkdev(uint32(e.Devmajor), uint32(e.Devminor))
	case tar.TypeReg:
		body := e.body
		if e.file != "" {
			var err error
			if body, err = os.ReadFile(e.file); err != nil {
				return err
			}
		}
		n.Size, n.Sum = int64(len(body)), fmt.Sprintf("%x", sha256.Sum256(body))
	}
	return nil
}

// list adds what is below n to the tree, and its names to those of the inode.
func (n *modelInode) list(name string, t Tree, names map[*modelInode][]string) {
	t[name] = n.Inode
	if n.names == nil {
		names[n] = append(names[n], name)
	}
	for base, child := range n.names {
		child.list(path.Join(name, base), t, names)
	}
}

// SameView compares what [Puller.View] has read with what [Image.Model] has
// computed, and describes the first differences; empty when there are none.
func SameView(want Tree, wantLinks map[string]string, got Tree, links map[string]string) string {
	got = maps.Clone(got)
	for name, w := range want {
		if g, ok := got[name]; ok && w.Mtime.IsZero() {
			g.Mtime = time.Time{}
			got[name] = g
		}
	}
	text := Diff(want, got, 8)
	if text == "" && !maps.Equal(wantLinks, links) {
		text = fmt.Sprintf("hardlinks: want %q\n           got  %q\n", wantLinks, links)
	}
	return text
}

package overlay

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// This file knows what containerd's applier makes of a tar in the directory of
// a layer (pkg/archive, 2.4.2): which entries it refuses or gets wrong whatever snapshotter
// keeps the layer, and what it gives to directories that have no entry.

// made is one name in the directory of a layer.
type made struct {
	kit.Inode
	keys    []string // of the xattrs
	kind    kind
	entry   entry
	implied bool // made for what lies in it, so far without an entry
}

// upper is the directory of a layer by path.
type upper map[string]*made

// What the applier refuses or gets wrong by itself. Images with these are not
// generated; TestNamedDeviations has one of each.
var (
	errIllegal      = errors.New("the specification forbids it or leaves it open")
	errNotDirectory = errors.New("a parent lies below something that a middle layer removed or replaced")
	errLateXattrs   = errors.New("a directory's entry follows its content and lacks xattrs of the lower one")
	errNaiveOpaque  = errors.New("lowest layer: an opaque mark follows what lies in a directory without an entry")
	errLink         = errors.New("a hardlink's entry has other attributes than its target")
	errDevice       = errors.New("a character device 0:0 is a whiteout")
	errSetgid       = errors.New("a setgid directory: what is made in it belongs to its group")
)

// unpacked applies the tars of an image as containerd does. In parallel every
// layer is applied without knowing those below.
func unpacked(img image, parallel bool) ([]upper, error) {
	var uppers []upper
	for i, l := range img {
		u := upper{}
		lower := slices.Clone(uppers)
		slices.Reverse(lower) // the applier searches from the top down
		if parallel {
			lower = nil
		}
		for _, e := range l {
			if err := u.apply(e, lower, i == 0); err != nil {
				return nil, fmt.Errorf("layer %d: %v: %w", i+1, e, err)
			}
		}
		uppers = append(uppers, u)
	}
	return uppers, nil
}

// accepted is nil for images that the applier takes as the specification means
// them, in both ways of unpacking.
func accepted(img image) error {
	_, err := unpacked(img, true)
	if err == nil {
		_, err = unpacked(img, false)
	}
	return err
}

func (u upper) apply(e entry, lower []upper, lowest bool) error {
	inside := path.Dir(e.path)
	if e.kind == opaque {
		inside = e.path
	}
	for i := range parts(inside) {
		if err := u.parent(strings.Join(parts(inside)[:i+1], "/"), lower); err != nil {
			return err
		}
	}
	old := u[e.path]
	if e.path == "." && e.kind != opaque {
		return errIllegal // the applier passes the entry of the root over
	}
	switch e.kind {
	case opaque:
		for name, m := range u {
			if lowest && m.implied && below(name, e.path) {
				return errNaiveOpaque
			}
		}
		return nil
	case whiteout:
		if old != nil {
			return errIllegal
		}
	case hardlink:
		t := u[e.target]
		if old != nil || t == nil || t.kind == dir || t.kind == whiteout {
			return errIllegal
		}
		n := t.entry
		if e.mode != n.mode && t.kind != symlink || e.uid != n.uid || e.gid != n.gid || !e.mtime.Equal(n.mtime) || !maps.Equal(e.xattrs, n.xattrs) {
			return errLink
		}
	case dir:
		if old != nil && !old.implied {
			return errIllegal
		}
		if e.mode&0o2000 != 0 {
			return errSetgid
		}
		if old != nil {
			for _, k := range old.keys {
				if !slices.Contains(keys(e), k) {
					return errLateXattrs
				}
			}
		}
	default:
		if old != nil {
			return errIllegal
		}
		if e.kind == char && e.major == 0 && e.minor == 0 {
			return errDevice
		}
	}
	if e.kind == hardlink {
		u[e.path] = u[e.target]
		return nil
	}
	n := inode{}
	n.set(e)
	u[e.path] = &made{Inode: n.Inode, keys: keys(e), kind: e.kind, entry: e}
	return nil
}

// parent is the applier's mkparent: it gives a directory that it has to make
// what the first of the lower directories has under the same path.
func (u upper) parent(name string, lower []upper) error {
	if m := u[name]; m != nil {
		if m.kind != dir {
			return errIllegal
		}
		return nil
	}
	m := &made{Inode: newDirectory().Inode, kind: dir, implied: true}
	u[name] = m
	for _, l := range lower {
		found, err := l.resolve(name)
		switch {
		case err != nil:
			return err
		case found == nil:
			continue
		case found.kind == dir:
			m.Inode, m.keys = found.Inode, found.keys
		}
		return nil
	}
	return nil
}

// resolve looks up a name as continuity's fs.RootPath and Lstat do: symlinks
// are followed within this one layer, at the end of the path, too.
func (u upper) resolve(name string) (*made, error) {
	at, rest := ".", parts(name)
	for links := 0; len(rest) > 0; {
		if m := u[at]; m != nil && m.kind != dir {
			return nil, errNotDirectory
		}
		next := path.Join(at, rest[0])
		m := u[next]
		if m == nil || m.kind != symlink {
			at, rest = next, rest[1:]
			continue
		}
		if links++; links > 255 {
			return nil, errNotDirectory
		}
		from := at
		if path.IsAbs(m.entry.target) {
			from = "."
		}
		whole := path.Join("/", from, m.entry.target, strings.Join(rest[1:], "/"))
		at, rest = ".", strings.FieldsFunc(whole, func(r rune) bool { return r == '/' })
	}
	if at == "." {
		return &made{Inode: newDirectory().Inode, kind: dir}, nil
	}
	if m := u[path.Dir(at)]; m != nil && m.kind != dir {
		return nil, errNotDirectory
	}
	return u[at], nil
}

func keys(e entry) []string { return slices.Sorted(maps.Keys(e.xattrs)) }

// below reports whether name lies in dir, at any depth.
func below(name, dir string) bool {
	return dir == "." && name != "." || strings.HasPrefix(name, dir+"/")
}

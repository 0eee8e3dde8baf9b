package seal

import (
	"strings"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
)

// Top are the names that a chain of layers shows in its root, by their seals.
// Layers are added with Below and BelowTree, the topmost first.
type Top struct {
	space overlayutil.Space
	shown map[string]bool // false: hidden by a whiteout
}

// NewTop returns a Top to which no layer has been added.
func NewTop(space overlayutil.Space) *Top { return &Top{space, map[string]bool{}} }

// Open reports whether a lower layer may still decide something.
func (t *Top) Open() bool { return true }

// Forget discards what lower layers have decided.
func (t *Top) Forget() { clear(t.shown) }

// Below is [Dirs.Below].
func (t *Top) Below(_, file, digest string) error {
	root := "" // the root's mark
	return eachLineBelow(file, digest, func(rel string, line []byte) (bool, error) {
		if rel == "." {
			root = fieldsOf(line).opaque(t.space)
			return true, nil
		}
		if strings.Contains(rel, "/") {
			return true, nil
		}
		if _, decided := t.shown[rel]; !decided {
			t.shown[rel] = !isWhiteout(fieldsOf(line), t.space, root)
		}
		return true, nil
	})
}

// isWhiteout is overlayutil.Space.IsWhiteout for the fields of a line.
func isWhiteout(f *fields, space overlayutil.Space, around string) bool {
	switch f.get("type") {
	case mtree.TypeName(unix.S_IFCHR):
		return f.get("device") == "native,0,0"
	case mtree.TypeName(unix.S_IFREG):
		if f.get("size") != "0" || around != overlayutil.XattrWhiteouts {
			return false
		}
		_, set := f.mark(space, overlayutil.AttrWhiteout)
		return set
	}
	return false
}

// BelowTree is [Dirs.BelowTree].
func (t *Top) BelowTree(tree string) error { return t.space.AddTop(tree, t.shown) }

// Names returns the names that are shown, sorted.
func (t *Top) Names() []string { return overlayutil.Shown(t.shown) }

// SealedTop returns the names in the root of a sealed tree; the value of a
// directory is whether it is opaque, and true for all else.
func SealedTop(file, digest string, space overlayutil.Space) (map[string]bool, error) {
	names := map[string]bool{}
	err := eachLine(file, digest, func(rel string, line []byte) (bool, error) {
		if rel != "." && !strings.Contains(rel, "/") {
			f := fieldsOf(line)
			names[rel] = f.get("type") != mtree.TypeName(unix.S_IFDIR) || f.opaque(space) == overlayutil.Opaque
		}
		return true, nil
	})
	return names, err
}

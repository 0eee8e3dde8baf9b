package seal

import (
	"context"
	"fmt"
	"math"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
)

// Dirs are the directories of a layer, and what the layers below it show at their paths.
// It determines what an overlay mount of the lower layers alone would show there, from the
// seals of those layers and without a mount:
//
//	ListDirs, SealedDirs  the directories of the layer itself
//	Below, BelowTree      one call for each lower layer, the topmost first, as long as
//	                      Open reports that some directory is undecided
//	Shown, Compare        the result
//
// A directory is undecided until a lower layer has it, which then shows it, or hides it.
//
// Its memory grows with the number of directories and the length of their last
// names only, whatever the size of the lower layers; attributes that many
// directories have are kept once, and take at most shownLimit bytes.
//
// A Dirs may be used by one goroutine at a time.
type Dirs struct {
	space overlayutil.Space
	names []byte    // last names, one after another
	nodes []dirNode // in the order of a walk; the first is the root

	ancestors  []uint32 // while nodes are added: the last one, and the directories above it
	rootOpaque bool

	undecided int                // nodes that no lower layer has decided
	shown     []shownDir         // what they show, each kind once
	index     map[shownDir]int32 // into shown
	bytes     int                // in shown

	last dirCursor // where the last call of find ended
}

// dirNode is a directory.
type dirNode struct {
	name  uint32 // where its name begins in names
	end   uint32 // index of the first node that is not below it
	shown int32  // index into shown, or one of the constants below
}

const (
	nodeUnwanted  int32 = -1 - iota // what is shown there is not determined
	nodeUndecided                   // no lower layer so far has it or hides it
	nodeNone                        // no directory is shown there
)

// shownDir is a directory of a lower layer: its line, without a path and with
// what can be inherited only, and the tree that has it. The tree is "" when the
// line has all values in full.
type shownDir struct{ line, tree string }

// shownLimit bounds what is kept of the directories of lower layers, in bytes.
// Directories of real layers have few different attributes.
const shownLimit = 16 << 20

func newDirs(space overlayutil.Space) *Dirs {
	return &Dirs{space: space, index: map[shownDir]int32{}}
}

// ListDirs reads the directories of a tree. want selects those for which Shown can be
// called; the entry that it gets has no attributes. space is that of the marks of
// overlayfs which count.
func ListDirs(ctx context.Context, root string, space overlayutil.Space, want func(*Entry) bool) (*Dirs, error) {
	t, err := tree.Open(root)
	if err != nil {
		return nil, err
	}
	defer t.Close()
	d := newDirs(space)
	err = t.Walk(ctx, func(rel string) (bool, error) {
		st, err := t.Lstat(rel)
		e := Entry{Path: rel, Stat: st}
		if err != nil || e.Type() != unix.S_IFDIR {
			return false, err
		}
		return true, d.add(rel, want(&e))
	}, func(string) error { return nil })
	if err != nil {
		return nil, err
	}
	d.close(0)
	return d, nil
}

// SealedDirs reads the directories of a tree from its seal, whose text must have the given
// digest. Shown can be called for all but the root and those below an opaque directory,
// where nothing of lower layers is shown.
func SealedDirs(file, digest string, space overlayutil.Space) (*Dirs, error) {
	d := newDirs(space)
	hidden := "" // the directory below which lower layers are hidden
	err := eachLine(file, digest, func(rel string, line []byte) (bool, error) {
		f := fieldsOf(line)
		if f.get("type") != mtree.TypeName(unix.S_IFDIR) {
			return true, nil
		}
		below := hidden == "." || hidden != "" && strings.HasPrefix(rel, hidden+"/")
		if !below && f.opaque(space) == overlayutil.Opaque {
			hidden = rel
		}
		return true, d.add(rel, !below && rel != ".")
	})
	if err != nil {
		return nil, err
	}
	d.close(0)
	d.rootOpaque = hidden == "."
	return d, nil
}

// RootOpaque reports whether the root is opaque, by the seal that SealedDirs has read.
func (d *Dirs) RootOpaque() bool { return d.rootOpaque }

// add adds a directory. They must come in the order of a walk.
func (d *Dirs) add(rel string, wanted bool) error {
	depth, name := 0, ""
	if rel != "." {
		depth, name = strings.Count(rel, "/")+1, path.Base(rel)
	}
	switch {
	case depth > len(d.ancestors) || depth == 0 && len(d.nodes) > 0:
		return fmt.Errorf("%w: %q does not come after the directory around it", mtree.ErrUnsealed, rel)
	case len(d.nodes) == math.MaxInt32 || uint64(len(d.names)+len(name)) > math.MaxUint32:
		return fmt.Errorf("a tree of more than %d directories", len(d.nodes))
	}
	d.close(depth)
	n := dirNode{name: uint32(len(d.names)), shown: nodeUnwanted}
	if wanted {
		n.shown = nodeUndecided
		d.undecided++
	}
	d.names = append(d.names, name...)
	d.ancestors = append(d.ancestors, uint32(len(d.nodes)))
	d.nodes = append(d.nodes, n)
	return nil
}

// close records where the directories end that are depth levels deep, and deeper: all that
// is below them has been added.
func (d *Dirs) close(depth int) {
	for len(d.ancestors) > depth {
		last := len(d.ancestors) - 1
		d.nodes[d.ancestors[last]].end = uint32(len(d.nodes))
		d.ancestors = d.ancestors[:last]
	}
}

func (d *Dirs) name(i uint32) []byte {
	end := len(d.names)
	if int(i)+1 < len(d.nodes) {
		end = int(d.nodes[i+1].name)
	}
	return d.names[d.nodes[i].name:end]
}

// Open reports whether a directory is undecided: a further lower layer may decide it.
func (d *Dirs) Open() bool { return d.undecided > 0 }

// Forget makes all directories undecided again, as before the first call of Below.
func (d *Dirs) Forget() {
	d.undecided, d.bytes, d.shown = 0, 0, nil
	clear(d.index)
	for i := range d.nodes {
		if d.nodes[i].shown != nodeUnwanted {
			d.nodes[i].shown = nodeUndecided
			d.undecided++
		}
	}
}

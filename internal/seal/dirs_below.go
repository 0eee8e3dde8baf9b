package seal

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
)

// Below adds the next lower layer: a tree by its seal in file, whose text must
// have the given digest. After an error nothing is known of that layer, and the
// caller calls Forget before it begins again; the error wraps mtree.ErrUnsealed when the reason is the seal.
//
// It decides as overlayutil.Stack.Lookup does on disk: see merge.
func (d *Dirs) Below(tree, file, digest string) error {
	m := merge{d: d, tree: tree, at: d.first()}
	err := eachLineBelow(file, digest, func(rel string, line []byte) (bool, error) {
		err := m.entry(rel, line)
		return !m.at.done(), err
	})
	if err != nil {
		return err
	}
	m.rest()
	return nil
}

// BelowTree adds the next lower layer, one that was never sealed, as it is on
// disk.
func (d *Dirs) BelowTree(tree string) error {
	for at := d.first(); !at.done(); at.move(at.i + 1) {
		n := &d.nodes[at.i]
		if n.shown != nodeUndecided {
			continue
		}
		found, last, err := d.space.LookupIn(tree, at.path)
		if err != nil {
			return err
		}
		if found == "" {
			if last {
				d.decide(n, nodeNone)
			}
			continue
		}
		e, err := Read(found, at.path)
		if err != nil {
			return err
		}
		if e.Type() != unix.S_IFDIR {
			d.decide(n, nodeNone)
			continue
		}
		line := e.appendLine(nil)
		if err := d.show(n, line[:len(line)-1], tree); err != nil {
			return err
		}
	}
	return nil
}

// merge decides directories by the seal of one lower layer. Both are in the order of a
// walk, so that one pass over both is enough.
//
// A directory shows itself. Anything else hides its own path and all that is
// below it: a whiteout, a file, a link. An opaque directory hides what is below
// it and not in this layer; the kernel ignores the mark of a layer's root.
type merge struct {
	d      *Dirs
	tree   string
	at     dirCursor
	opaque uint32 // nodes before this one are below an opaque directory of the layer
}

// entry takes the next line of the seal, which is of the path rel.
func (m *merge) entry(rel string, line []byte) error {
	for !m.at.done() {
		order := mtree.ComparePaths(m.at.path, rel)
		if order > 0 {
			return nil // not the path of a directory of the layer above
		}
		if order == 0 {
			return m.match(line)
		}
		m.absent()
	}
	return nil
}

// match decides the present directory by the entry that the layer has at its path.
func (m *merge) match(line []byte) error {
	i := m.at.i
	n := &m.d.nodes[i]
	f := fieldsOf(line)
	if f.get("type") != mtree.TypeName(unix.S_IFDIR) {
		m.hide(i, n.end)
		m.at.move(n.end)
		return nil
	}
	if n.shown == nodeUndecided {
		if err := m.d.show(n, line, m.tree); err != nil {
			return err
		}
	}
	if i > 0 && f.opaque(m.d.space) == overlayutil.Opaque {
		m.opaque = max(m.opaque, n.end)
	}
	m.at.move(i + 1)
	return nil
}

// absent goes past a directory that the layer does not have, and all below it: it is
// hidden below an opaque directory of the layer, and stays undecided elsewhere.
func (m *merge) absent() {
	end := m.d.nodes[m.at.i].end
	if m.at.i < m.opaque {
		m.hide(m.at.i, end)
	}
	m.at.move(end)
}

// rest goes past the directories that come after the last line of the seal.
func (m *merge) rest() {
	for !m.at.done() {
		m.absent()
	}
}

// hide records that nothing is shown at the nodes from one to before another.
func (m *merge) hide(from, to uint32) {
	for i := from; i < to; i++ {
		if n := &m.d.nodes[i]; n.shown == nodeUndecided {
			m.d.decide(n, nodeNone)
		}
	}
}

func (d *Dirs) decide(n *dirNode, as int32) {
	n.shown = as
	d.undecided--
}

// show records that a node shows the directory of a line, which is in tree.
func (d *Dirs) show(n *dirNode, line []byte, tree string) error {
	text, digests := inheritableLine(line)
	s := shownDir{line: text}
	if digests {
		s.tree = tree
	}
	i, known := d.index[s]
	if !known {
		if d.bytes += len(s.line); d.bytes > shownLimit {
			return fmt.Errorf("the attributes of directories in lower layers take more than %d bytes: remove extended attributes from them", shownLimit)
		}
		i = int32(len(d.shown))
		d.shown, d.index[s] = append(d.shown, s), i
	}
	d.decide(n, i)
	return nil
}

package overlay

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// generate makes image number n of a seed. Names come from a handful, so that
// layers meet: most of what a layer does is done to what is there already.
func generate(seed, n uint64) image {
	g := &generator{Rand: rand.New(rand.NewPCG(seed, n)), root: newDirectory()}
	g.names = append(g.names, "a", "b", "c")
	for range 1 + g.IntN(3) {
		g.names = append(g.names, pick(g, oddNames))
	}
	slices.Sort(g.names)
	g.names = slices.Compact(g.names)

	layers := 1 + g.IntN(5)
	if g.chance(6) {
		layers = 6 + g.IntN(7)
	}
	for range layers {
		g.layer()
	}
	return g.image
}

// oddNames are what a tar may hold and a careless program trips over.
var oddNames = []string{
	"new\nline", `"quotes' and \`, "\xff\xfenot utf-8", "-leading-dash", " spaces ", "colon:comma,", "…", ".wh", "...",
	"tab\tand\x01", "*?[a]$(x)", "snapshots", strings.Repeat("long", 63) + "end", "%s%n", "work",
}

type generator struct {
	*rand.Rand
	image image
	names []string
	root  *inode   // what the layers so far mean
	gone  []string // paths that some layer has removed
	count int
}

func (g *generator) chance(n int) bool { return g.IntN(n) == 0 }

func pick[T any](g *generator, from []T) T { return from[g.IntN(len(from))] }

// layer adds a layer. Steps that contradict each other within one layer, or
// that the applier does not take, are left out again.
func (g *generator) layer() {
	if g.chance(12) {
		g.image = append(g.image, layer{})
		return
	}
	var l layer
	for range 1 + g.IntN(9) {
		if step := g.step(); g.fits(append(slices.Clone(l), step...)) {
			l = append(l, step...)
		}
	}
	for range 6 {
		if mixed := g.mix(l); g.fits(mixed) {
			l = mixed
			break
		}
	}
	g.image = append(g.image, l)
	for _, e := range l {
		if e.kind == whiteout {
			g.gone = append(g.gone, e.path)
		}
	}
	g.root.apply(l)
}

func (g *generator) fits(l layer) bool {
	return accepted(append(g.image.clone(), l)) == nil
}

// mix brings the entries into another order: markers before and after their
// siblings, directories after their content. Only a hardlink has a place, after
// its target; what comes out wrong does not fit.
func (g *generator) mix(l layer) layer {
	l = slices.Clone(l)
	if g.chance(3) {
		return l
	}
	g.Shuffle(len(l), func(i, j int) { l[i], l[j] = l[j], l[i] })
	slices.SortStableFunc(l, func(a, b entry) int {
		switch {
		case a.kind == hardlink && b.kind != hardlink:
			return 1
		case a.kind != hardlink && b.kind == hardlink:
			return -1
		}
		return 0
	})
	return l
}

// step is one thing that a build does.
func (g *generator) step() layer {
	switch g.IntN(20) {
	case 0, 1, 2:
		if name := g.existing(); name != "." {
			return layer{g.marker(whiteout, name)}
		}
	case 3:
		return layer{g.marker(whiteout, g.invent())}
	case 4, 5:
		return layer{g.marker(opaque, g.existingDirectory())}
	case 6:
		if g.chance(2) {
			return layer{g.marker(opaque, ".")}
		}
		return layer{g.marker(opaque, g.invent())}
	case 7, 8:
		return g.rename()
	case 9, 10:
		return g.linked()
	case 11, 12:
		if len(g.gone) > 0 { // again after it was deleted
			return g.withParents(g.something(pick(g, g.gone)))
		}
	case 13, 14, 15: // over what is there, of the same type or another
		return g.withParents(g.something(g.existing()))
	}
	return g.withParents(g.something(g.invent()))
}

// existing is a path that the layers so far show.
func (g *generator) existing() string {
	return pick(g, slices.Sorted(maps.Keys(g.root.view().Tree)))
}

func (g *generator) existingDirectory() string {
	tree := g.root.view().Tree
	maps.DeleteFunc(tree, func(_ string, n kit.Inode) bool { return !n.Mode.IsDir() })
	return pick(g, slices.Sorted(maps.Keys(tree)))
}

// invent is a path in or below something that exists, or anywhere.
func (g *generator) invent() string {
	name := "."
	if g.chance(2) {
		name = g.existingDirectory()
	}
	for range 1 + g.IntN(3) {
		name = path.Join(name, pick(g, g.names))
	}
	return name
}

func (g *generator) marker(k kind, name string) entry {
	return entry{kind: k, path: name, mtime: usualTime, uid: pick(g, []int{0, 0, 7})}
}

// something is an entry of any type with any attributes.
func (g *generator) something(name string) entry {
	g.count++
	e := entry{path: name, mtime: g.time(), uid: pick(g, ids), gid: pick(g, ids)}
	switch g.IntN(16) {
	case 0, 1, 2, 3, 4, 5:
		e.kind, e.mode = dir, pick(g, []int64{0o755, 0o755, 0o700, 0o1777, 0, 0o4711, 0o555})
	case 6, 7:
		e.kind, e.mode, e.target = symlink, 0o777, pick(g, []string{"nowhere", "/a", "../b", pick(g, g.names), "a/b"})
	case 8:
		e.kind, e.mode = fifo, 0o620
	case 9:
		e.kind, e.mode, e.major, e.minor = char, 0o666, 1, int64(g.IntN(9)+1)
	case 10:
		e.kind, e.mode, e.major, e.minor = block, 0o600, int64(g.IntN(500)), 300
	default:
		e.kind, e.mode = file, pick(g, []int64{0o644, 0o644, 0o755, 0, 0o4755, 0o2755, 0o6711})
		if !g.chance(6) {
			e.body = fmt.Sprintf("number %d, %s", g.count, strings.Repeat("x", g.IntN(60)))
		}
	}
	switch name := e.name(); {
	case g.chance(15):
		e.spelt = "./" + name
	case g.chance(15):
		e.spelt = "/" + name
	case g.chance(15):
		e.spelt = strings.Replace(name, "/", "//", 1)
	}
	g.xattrs(&e)
	return e
}

var ids = []int{0, 0, 0, 1, 1000, 65534, 2_000_000}

// time is mostly in the past. Some builders write no time, and a machine whose
// clock is behind sees layers from the future.
func (g *generator) time() time.Time {
	switch g.IntN(8) {
	case 0:
		return time.Unix(0, 0)
	case 1:
		return time.Unix(2_100_000_000, 5)
	}
	return usualTime.Add(time.Duration(g.Int64N(int64(1e15))))
}

func (g *generator) xattrs(e *entry) {
	if e.kind != dir && e.kind != file || !g.chance(4) {
		return
	}
	e.xattrs = map[string]string{}
	for range 1 + g.IntN(2) {
		e.xattrs["user."+pick(g, []string{"one", "two", "odd\nname", "überlay"})] = pick(g, []string{"", "1", "a\x00b", strings.Repeat("v", 300)})
	}
	if e.kind == file && g.chance(2) {
		e.xattrs["security.capability"] = kit.Capability(1 << g.IntN(20))
	}
}

// withParents puts entries for none, some or all of the parents beside e, as
// different builders do. Those left out are implied.
func (g *generator) withParents(e entry) layer {
	var l layer
	all, none := g.chance(3), g.chance(3)
	for name := path.Dir(e.path); name != "."; name = path.Dir(name) {
		if !none && (all || g.chance(2)) {
			p := g.something(name)
			if old := g.root.find(name); old != nil && g.chance(2) {
				p.uid, p.gid = int(old.Uid), int(old.Gid)
			}
			p.kind, p.mode, p.spelt, p.target, p.body = dir, pick(g, []int64{0o755, 0o711}), "", "", ""
			p.major, p.minor = 0, 0
			delete(p.xattrs, "security.capability")
			l = append(l, p)
		}
	}
	slices.Reverse(l)
	return append(l, e)
}

// rename moves what is there, a directory with all it holds, as a build step
// does it: removed here, written there.
func (g *generator) rename() layer {
	from, to := g.existing(), g.invent()
	if from == "." || from == to || below(to, from) {
		return nil
	}
	tree := g.root.view()
	l := layer{g.marker(whiteout, from)}
	for _, name := range slices.Sorted(maps.Keys(tree.Tree)) {
		if name != from && !below(name, from) {
			continue
		}
		e := g.something(to + strings.TrimPrefix(name, from))
		e.spelt = ""
		switch mode := tree.Tree[name].Mode; {
		case mode.IsDir() != (e.kind == dir) && mode.IsDir():
			e.kind, e.mode, e.target, e.body, e.major, e.minor = dir, 0o755, "", "", 0, 0
			delete(e.xattrs, "security.capability")
		case e.kind == dir && !mode.IsDir():
			e.kind, e.mode, e.body = file, 0o600, "moved"
		}
		l = append(l, e)
	}
	return l
}

// linked is a file with another name in another directory of the layer.
func (g *generator) linked() layer {
	e := g.something(g.invent())
	if e.kind == dir {
		e.kind, e.mode, e.body, e.spelt = file, 0o644, "linked", ""
	}
	l := g.withParents(e)
	for range 1 + g.IntN(2) {
		h := e
		h.kind, h.path, h.spelt, h.target, h.body, h.major, h.minor = hardlink, g.invent(), "", e.path, "", 0, 0
		l = append(l, h)
	}
	return l
}

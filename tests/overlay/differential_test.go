package overlay

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// way is a way of unpacking, with what it must come to.
type way struct {
	name        string
	snapshotter string
	limit       int
	want        func(image) (view, error)
}

var ways = []way{
	{"durable", durable, 0, right},
	{"durable, in parallel", durable, 3, right},
	{"built-in", overlayfs, 0, func(img image) (view, error) { return stockView(img, false) }},
	{"built-in, in parallel", overlayfs, 3, func(img image) (view, error) { return stockView(img, true) }},
}

func right(img image) (view, error) { return reference(img).view(), nil }

// TestDifferential unpacks generated images in every way. Durable must show
// what the specification defines, the built-in snapshotter that or a deviation
// with a name.
func TestDifferential(t *testing.T) {
	if *single >= 0 {
		t.Logf("image %d of seed %d:\n%v", *single, *seed, generate(*seed, uint64(*single)))
		for _, fs := range []string{"ext4", "xfs", "btrfs"} {
			t.Run(fs, func(t *testing.T) { differential(t, newNode(t, fs, ""), uint64(*single), ways) })
		}
		return
	}
	// Most on ext4, the file system of most nodes, a few on the others.
	few := *images / 20
	start := 0
	for _, part := range []struct {
		fs    string
		count int
	}{{"ext4", *images - 2*few}, {"xfs", few}, {"btrfs", few}} {
		t.Run(part.fs, func(t *testing.T) {
			var n *node
			began, failures := time.Now(), 0
			for i := range part.count {
				if i%500 == 0 { // before the disk is full
					n = newNode(t, part.fs, "")
				}
				if !differential(t, n, uint64(start+i), ways) {
					if failures++; failures == *limit {
						break
					}
				}
			}
			t.Logf("%d images in %v", part.count, time.Since(began).Round(time.Millisecond))
		})
		start += part.count
	}
}

// differential tests one image, and reports whether it is right.
func differential(t *testing.T, n *node, number uint64, ways []way) bool {
	t.Helper()
	img := generate(*seed, number)
	err := n.differs(t.Context(), img, ways)
	if err == nil {
		return true
	}
	var d *difference
	if !errors.As(err, &d) {
		t.Fatalf("image %d of seed %d: %v\n%v", number, *seed, err, indent(img.String()))
	}
	small := shrink(img, time.Minute, func(img image) bool {
		var e *difference
		return errors.As(n.differs(t.Context(), img, ways), &e) && e.way == d.way
	})
	t.Errorf("image %d of seed %d (-seed %d -image %d), shrunk:\n%v\n%v",
		number, *seed, *seed, number, indent(small.String()), n.differs(t.Context(), small, ways))
	return false
}

// difference is a tree that is not as it must be.
type difference struct{ way, text string }

func (d *difference) Error() string {
	return fmt.Sprintf("unpacked by %s, the tree is not right:\n%s", d.way, d.text)
}

// differs unpacks an image in every way and compares. The error is a difference
// when an unpacking shows the wrong tree, or does not succeed.
func (n *node) differs(ctx context.Context, img image, ways []way) error {
	for _, w := range ways {
		if !strings.HasPrefix(w.name, *only) {
			continue
		}
		if err := n.compare(ctx, img, w); err != nil {
			return err
		}
	}
	return nil
}

// compare unpacks an image in one way. Durable's layers are lost afterwards, and
// must be the same when they are healed.
func (n *node) compare(ctx context.Context, img image, w way) (err error) {
	want, err := w.want(img)
	if err != nil {
		return err
	}
	u, err := n.unpack(ctx, img, w.snapshotter, w.limit)
	if err != nil {
		return &difference{w.name, err.Error()}
	}
	defer func() { err = errors.Join(err, u.remove()) }()
	if err := u.differs(want, img, w.name); err != nil || w.snapshotter != durable {
		return err
	}
	if err := n.lose(); err != nil {
		return err
	}
	return u.differs(want, img, w.name+" and healed")
}

// differs returns the difference between what an unpacked image shows and what it
// should.
func (u *unpacking) differs(want view, img image, way string) error {
	got, err := u.view()
	if err != nil {
		return &difference{way, err.Error()}
	}
	if text := want.diff(got, img); text != "" {
		return &difference{way, text}
	}
	return nil
}

// diff describes how got is not want. It is empty when they are the same.
func (want view) diff(got view, img image) string {
	tree := maps.Clone(got.Tree)
	for name, g := range tree {
		if _, is := want.Tree[name]; !is && g.Phantom && phantom(img, name) {
			delete(tree, name)
			continue
		}
		// Not known from a tar: the time of a directory that the topmost layer with
		// something in it has no entry for.
		if w, is := want.Tree[name]; is && w.Mode.IsDir() && w.Mtime.IsZero() {
			g.Mtime = time.Time{}
			tree[name] = g
		}
	}
	text := kit.Diff(want.Tree, tree, 8)
	if text == "" && !maps.Equal(want.links, got.links) {
		text = fmt.Sprintf("hardlinks: want %q\n           got  %q\n", want.links, got.links)
	}
	return text
}

// shrink makes an image smaller as long as fails reports that it still fails:
// without a layer, without an entry, without anything unusual about an entry.
func shrink(img image, limit time.Duration, fails func(image) bool) image {
	deadline := time.Now().Add(limit)
	try := func(small image) bool {
		if time.Now().After(deadline) || len(small) == 0 || accepted(small) != nil || !fails(small) {
			return false
		}
		img = small
		return true
	}
	for again := true; again; {
		again = false
		for i := len(img) - 1; i >= 0; i-- {
			again = try(slices.Delete(img.clone(), i, i+1)) || again
		}
		for i := len(img) - 1; i >= 0; i-- {
			for k := len(img[i]) - 1; k >= 0; k-- {
				small := img.clone()
				small[i] = slices.Delete(small[i], k, k+1)
				again = try(small) || again
			}
		}
		for i := range img {
			for k := range img[i] {
				for _, e := range simpler(img[i][k]) {
					small := img.clone()
					small[i][k] = e
					again = try(small) || again
				}
			}
		}
	}
	return img
}

// simpler are the forms of an entry with one thing less about it.
func simpler(e entry) (all []entry) {
	add := func(s entry) {
		if s.String() != e.String() {
			all = append(all, s)
		}
	}
	add(e.with(func(e *entry) { e.xattrs = nil }))
	add(e.with(func(e *entry) { e.uid, e.gid = 0, 0 }))
	add(e.with(func(e *entry) { e.spelt = "" }))
	add(e.with(func(e *entry) { e.mtime = usualTime }))
	switch {
	case e.kind == dir:
		add(e.withMode(0o755))
		add(entry{kind: file, path: e.path, mode: 0o644, mtime: usualTime})
	case e.kind != symlink && e.kind != hardlink && !e.marker():
		add(entry{kind: file, path: e.path, mode: 0o644, mtime: usualTime})
	}
	return all
}

// TestGenerator shows that the generated images have in them what this is
// about, and that a seed makes the same images everywhere.
func TestGenerator(t *testing.T) {
	seen := map[string]int{}
	for i := range uint64(300) {
		img := generate(*seed, i)
		if again := generate(*seed, i); again.String() != img.String() {
			t.Fatalf("image %d of seed %d is another the second time:\n%v\n%v", i, *seed, img, again)
		}
		check(t, accepted(img))
		features(img, func(what string) { seen[what]++ })
	}
	for _, what := range strings.Fields("twelve-layers empty-layer dir file symlink hardlink char block fifo whiteout opaque" +
		" root-opaque opaque-without-entry opaque-after-sibling opaque-before-sibling implied-over-nothing implied-over-odd" +
		" file-over-dir dir-over-file again-after-whiteout link-across late-dir xattr capability setuid sticky mode-0000 odd-name long-name" +
		" stock-wrong-sequential stock-wrong-parallel") {
		if seen[what] < 3 {
			t.Errorf("%s: in %d of 300 images", what, seen[what])
		}
	}
	t.Log(seen)
}

// features calls saw once for everything of interest in an image.
func features(img image, saw func(string)) {
	all := map[string]bool{}
	all["twelve-layers"] = len(img) == 12
	root, removed := newDirectory(), map[string]bool{}
	for _, l := range img {
		all["empty-layer"] = all["empty-layer"] || len(l) == 0
		at := map[string]int{}
		for i, e := range l {
			if !e.marker() {
				at[e.path] = i + 1
			}
		}
		for i, e := range l {
			old := root.find(e.path)
			inside := path.Dir(e.path)
			for flag, is := range map[string]bool{
				string(e.kind):          true,
				"root-opaque":           e.kind == opaque && e.path == ".",
				"opaque-without-entry":  e.kind == opaque && at[e.path] == 0 && e.path != ".",
				"implied-over-nothing":  !e.marker() && inside != "." && at[inside] == 0 && root.find(inside) == nil,
				"implied-over-odd":      inside != "." && at[inside] == 0 && root.find(inside) != nil && root.find(inside).Mode.Perm() != 0o755,
				"file-over-dir":         e.kind == file && old != nil,
				"dir-over-file":         e.kind == dir && old == nil && root.has(e.path),
				"again-after-whiteout":  !e.marker() && removed[e.path],
				"link-across":           e.kind == hardlink && path.Dir(e.target) != inside,
				"late-dir":              !e.marker() && at[inside] > i+1,
				"xattr":                 len(e.xattrs) > 0,
				"capability":            e.xattrs["security.capability"] != "",
				"setuid":                e.mode&0o4000 != 0,
				"sticky":                e.mode&0o1000 != 0,
				"mode-0000":             !e.marker() && e.mode == 0,
				"odd-name":              slices.Contains(oddNames, path.Base(e.path)),
				"long-name":             len(path.Base(e.path)) == 255,
				"opaque-after-sibling":  e.kind == opaque && sibling(l[:i], e.path),
				"opaque-before-sibling": e.kind == opaque && sibling(l[i:], e.path),
			} {
				all[flag] = all[flag] || is
			}
		}
		for _, e := range l {
			if e.kind == whiteout {
				removed[e.path] = true
			}
		}
		root.apply(l)
	}
	for name, parallel := range map[string]bool{"stock-wrong-sequential": false, "stock-wrong-parallel": true} {
		v, err := stockView(img, parallel)
		all[name] = err == nil && reference(img).view().diff(v, img) != ""
	}
	for flag, is := range all {
		if is {
			saw(flag)
		}
	}
}

func sibling(l layer, dir string) bool {
	return slices.ContainsFunc(l, func(e entry) bool { return !e.marker() && path.Dir(e.path) == dir })
}

func (root *inode) has(name string) bool {
	d := root.find(path.Dir(name))
	return d != nil && d.names[path.Base(name)] != nil
}

package overlay

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// deviation is an image that containerd with its built-in overlay snapshotter
// does not unpack as the specification means it. A nil outcome is the right one.
type deviation struct {
	name       string
	why        string
	image      image
	sequential *outcome
	parallel   *outcome
	durable    fate
	rejects    error // what accepted returns, for images that are not generated
}

// outcome is what comes of an image instead of what should.
type outcome struct {
	like    image  // the tree of this image
	refused string // an error with this text
	listed  string // this name is listed, and not found
}

// fate is what durable makes of an image.
type fate bool

const (
	cured  fate = true  // the right thing
	shared fate = false // the same as the built-in: it comes about in the applier or in the kernel
)

var odd = mkdir("d/sub").withMode(0o700).withOwner(1000, 50).withXattr("user.note", "kept")

var deviations = []deviation{
	{
		name:       "opaque root",
		why:        "the kernel does not read the marks of a layer's root",
		image:      image{{mkfile("old"), mkfile("d/old")}, {empty("."), mkfile("new"), mkfile("d/new")}},
		sequential: &outcome{like: image{{mkfile("old"), mkfile("d/old"), mkfile("new"), mkfile("d/new")}}},
		parallel:   &outcome{like: image{{mkfile("old"), mkfile("d/old"), mkfile("new"), mkfile("d/new")}}},
		durable:    cured,
	},
	{
		name:     "parent without an entry, in parallel",
		why:      "the applier does not know the layers below, so it cannot copy the attributes of the directory it makes",
		image:    image{{odd}, {mkfile("d/sub/f")}},
		parallel: &outcome{like: image{{mkdir("d/sub"), mkfile("d/sub/f")}}},
		durable:  cured,
	},
	{
		name:       "parent hidden by an opaque directory of a middle layer",
		why:        "the applier searches for the directory's name in one layer after the other and does not see that the opaque parent hides it",
		image:      image{{odd}, {empty("d"), mkfile("d/f")}, {mkfile("d/sub/f")}},
		sequential: &outcome{like: image{{odd, mkfile("d/f"), mkfile("d/sub/f")}}},
		durable:    cured,
	},
	{
		name:       "parent hidden by an opaque directory of the same layer",
		why:        "as above; the mark may even come later in the tar",
		image:      image{{odd}, {mkfile("d/sub/f"), empty("d")}},
		sequential: &outcome{like: image{{odd, mkfile("d/sub/f")}}},
		durable:    cured,
	},
	{
		name:       "parent hidden by an opaque directory, with nothing but a mark in it",
		why:        "as above; the time is copied, too, for no entry in the directory changes it",
		image:      image{{odd}, {empty("d"), empty("d/sub")}},
		sequential: &outcome{like: image{{odd}}},
		durable:    cured,
	},
	{
		name:       "parent hidden by an opaque root",
		why:        "as above, and the root does not hide anything",
		image:      image{{odd, mkfile("old")}, {mkfile("d/sub/f"), empty(".")}},
		sequential: &outcome{like: image{{odd, mkfile("old"), mkfile("d/sub/f")}}},
		parallel:   &outcome{like: image{{mkdir("d/sub"), mkfile("old"), mkfile("d/sub/f")}}},
		durable:    cured,
	},
	{
		name:       "top-level parent hidden by an opaque root",
		why:        "as above",
		image:      image{{odd.with(func(e *entry) { e.path = "top" })}, {mkfile("top/f"), empty(".")}},
		sequential: &outcome{like: image{{odd.with(func(e *entry) { e.path = "top" }), mkfile("top/f")}}},
		durable:    cured,
	},
	{
		name:       "two parents below a directory that an opaque root removed",
		why:        "nothing is removed, and attributes are copied from there",
		image:      image{{odd}, {empty(".")}, {mkfile("d/sub/f")}},
		sequential: &outcome{like: image{{odd, mkfile("d/sub/f")}}},
		durable:    cured,
	},
	{
		name:       "parent that is a symlink below",
		why:        "the directory that replaces the symlink is given the attributes of the one it led to",
		image:      image{{odd, mksymlink("link", "d/sub")}, {mkfile("link/f")}},
		sequential: &outcome{like: image{{odd, mkdir("link").withMode(0o700).withOwner(1000, 50).withXattr("user.note", "kept"), mkfile("link/f")}}},
		durable:    cured,
	},

	// These come about in the applier, and only when it knows the layers below.
	{
		name:       "two parents below what a middle layer removed",
		why:        "the applier searches every layer for the parents; below a whiteout the kernel answers ENOTDIR, and it gives up",
		image:      image{{mkfile("d/sub/f")}, {rm("d")}, {mkfile("d/sub/g")}},
		sequential: &outcome{refused: "not a directory"},
		durable:    cured,
		rejects:    errNotDirectory,
	},
	{
		name:       "entry of a directory after its content",
		why:        "the applier has copied the attributes of the lower directory by then, and the xattrs stay",
		image:      image{{odd}, {mkfile("d/sub/f"), mkdir("d/sub")}},
		sequential: &outcome{like: image{{mkdir("d/sub").withXattr("user.note", "kept"), mkfile("d/sub/f")}}},
		durable:    cured,
		rejects:    errLateXattrs,
	},

	// The rest comes about in the applier, which runs in containerd, or in the
	// kernel, whatever snapshotter keeps the layers.
	{
		name:       "opaque mark in the lowest layer after a directory without an entry",
		why:        "the lowest layer is unpacked without marks: a mark deletes what is there and was no entry of the tar, with all in it",
		image:      image{{mkfile("d/sub/f"), empty("d")}},
		sequential: &outcome{like: image{{empty("d")}}},
		parallel:   &outcome{like: image{{empty("d")}}},
		rejects:    errNaiveOpaque,
	},
	{
		name:       "whiteout before a directory of the same name",
		why:        "the directory replaces the whiteout and is not opaque, so what the whiteout removed comes back",
		image:      image{{mkfile("d/old")}, {rm("d"), mkdir("d")}},
		sequential: &outcome{like: image{{mkfile("d/old")}, {mkdir("d")}}},
		parallel:   &outcome{like: image{{mkfile("d/old")}, {mkdir("d")}}},
		rejects:    errIllegal,
	},
	{
		name:       "whiteout after an entry of the same name",
		why:        "a whiteout is made as a file of that name",
		image:      image{{mkfile("f")}, {mkfile("f"), rm("f")}},
		sequential: &outcome{refused: "file exists"},
		parallel:   &outcome{refused: "file exists"},
		rejects:    errIllegal,
	},
	{
		name:       "hardlink whose entry has no capability",
		why:        "the applier gives the attributes of the link's entry to the file, and the change of owner takes the capability",
		image:      image{{mkfile("f").withXattr("security.capability", kit.Capability(1)), mklink("g", "f")}},
		sequential: &outcome{like: image{{mkfile("f"), mklink("g", "f")}}},
		parallel:   &outcome{like: image{{mkfile("f"), mklink("g", "f")}}},
		rejects:    errLink,
	},
	{
		name:       "directory without an entry in a setgid directory of the lowest layer",
		why:        "mkdir(2) gives it the group of the other one",
		image:      image{{mkdir("d").withMode(0o2755).withOwner(0, 50), mkfile("d/sub/f")}},
		sequential: &outcome{like: image{{mkdir("d").withMode(0o2755).withOwner(0, 50), mkdir("d/sub").withOwner(0, 50), mkfile("d/sub/f")}}},
		parallel:   &outcome{like: image{{mkdir("d").withMode(0o2755).withOwner(0, 50), mkdir("d/sub").withOwner(0, 50), mkfile("d/sub/f")}}},
		rejects:    errSetgid,
	},
	{
		name:       "entry of the root",
		why:        "the applier passes over what is the root itself",
		image:      image{{mkdir(".").withMode(0o700).withOwner(5, 5), mkfile("f")}},
		sequential: &outcome{like: image{{mkfile("f")}}},
		parallel:   &outcome{like: image{{mkfile("f")}}},
		rejects:    errIllegal,
	},
	{
		name:       "device 0:0",
		why:        "overlayfs has no way to store one: it is its whiteout",
		image:      image{{mkfile("f")}, {entry{kind: char, path: "f", mode: 0o600, mtime: usualTime}}},
		sequential: &outcome{like: image{{mkfile("f")}, {rm("f")}}},
		parallel:   &outcome{like: image{{mkfile("f")}, {rm("f")}}},
		rejects:    errDevice,
	},
	{
		name:       "whiteout in a directory that no lower layer has",
		why:        "the kernel lists a directory that is not merged as it is, and searches for whiteouts only when a name is looked up",
		image:      image{{}, {mkdir("d"), rm("d/f")}},
		sequential: &outcome{listed: "d/f"},
		parallel:   &outcome{listed: "d/f"},
	},
}

// TestNamedDeviations keeps by name what the models of the differential test
// allow the built-in snapshotter, and what is not generated because containerd's
// applier or the kernel gets it wrong. One that is right one day fails here.
func TestNamedDeviations(t *testing.T) {
	n := newNode(t, "ext4", "")
	for _, d := range deviations {
		t.Run(d.name, func(t *testing.T) {
			if err := accepted(d.image); !errors.Is(err, d.rejects) {
				t.Errorf("the generator takes the image for: %v, want %v", err, d.rejects)
			}
			for _, w := range []struct {
				snapshotter string
				limit       int
				outcome     *outcome
			}{
				{overlayfs, 0, d.sequential},
				{overlayfs, 3, d.parallel},
				{durable, 0, d.durable.of(d.sequential)},
				{durable, 3, d.durable.of(d.parallel)},
			} {
				if text := w.outcome.check(t, n, d.image, w.snapshotter, w.limit); text != "" {
					t.Errorf("%s, limit %d: %s%v", w.snapshotter, w.limit, text, indent(d.image.String()))
				}
			}
		})
	}
}

// TestTimesFromTheExtraction: layers are pulled right after they are built, by
// machines whose clocks differ. A directory's entry is no less an entry when its
// time lies within the extraction of its layer.
func TestTimesFromTheExtraction(t *testing.T) {
	n := newNode(t, "ext4", "")
	n.pause = 2 * time.Second // while those instants pass
	for _, limit := range []int{0, 3} {
		var lower, upper layer
		began := time.Now()
		for i := range 400 {
			d := mkdir(fmt.Sprintf("d%03d", i))
			lower = append(lower, d.withMode(0o700).withOwner(1000, 50))
			upper = append(upper, d.withTime(began.Add(time.Duration(i)*50*time.Millisecond)))
			if i%2 == 1 {
				upper = append(upper, empty(d.path))
			}
		}
		upper = append(upper, mkfile("large").with(func(e *entry) { e.body = strings.Repeat("0123456789abcdef", 1<<19) }))
		img := image{lower, upper}
		u := start(t, n, img, durable, limit)
		if text := reference(img).view().diff(must[view](t)(u.view()), img); text != "" {
			t.Errorf("limit %d: extracted in the %v after %v:\n%s", limit, time.Since(began), began.UTC(), text)
		}
	}
}

func (f fate) of(o *outcome) *outcome {
	if f == cured {
		return nil
	}
	return o
}

// check unpacks an image and returns how the result differs from the outcome.
func (o *outcome) check(t *testing.T, n *node, img image, snapshotter string, limit int) string {
	t.Helper()
	u, err := n.unpack(t.Context(), img, snapshotter, limit)
	if o != nil && o.refused != "" {
		if err == nil || !strings.Contains(err.Error(), o.refused) {
			return "want the error " + o.refused + ", got " + errorText(err) + "\n"
		}
		return ""
	}
	if err != nil {
		return err.Error() + "\n"
	}
	got := must[view](t)(u.view())
	want := reference(img).view()
	switch {
	case o == nil:
	case o.listed != "":
		if !got.Tree[o.listed].Phantom {
			return "it does not list " + o.listed + "\n"
		}
	default:
		if text := want.diff(got, img); text == "" {
			return "the tree is right: no deviation any more\n"
		}
		want = reference(o.like).view()
		// A parent without an entry in the one image may have one in the other.
		untime(want)
		untime(got)
	}
	return want.diff(got, img)
}

func errorText(err error) string {
	if err == nil {
		return "none"
	}
	return err.Error()
}

func untime(v view) {
	for name, n := range v.Tree {
		if n.Mode.Type() == fs.ModeDir {
			n.Mtime = time.Time{}
			v.Tree[name] = n
		}
	}
}

package overlay

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// The four known ways to lose files, each shown on a stock code path first.

// write changes a snapshot through its mount, as a container does, and commits
// it under a name. At the end of the mount, touch may change the layer's
// directory itself.
func (u *unpacking) write(t *testing.T, parent, name string, change func(dir string) error, touch func(upper string) error) {
	t.Helper()
	check(t, u.tryWrite(t, parent, name, change, touch))
}

func (u *unpacking) tryWrite(t *testing.T, parent, name string, change, touch func(dir string) error) error {
	t.Helper()
	key := "writing " + name
	mounts := must[[]mount.Mount](t)(u.sn.Prepare(u.ctx, key, parent))
	if change != nil {
		check(t, mount.WithTempMount(u.ctx, mounts, change))
	}
	if touch != nil {
		check(t, touch(upperdir(t, mounts)))
	}
	return u.sn.Commit(u.ctx, name, key)
}

// upperdir is the directory of a layer that is being written.
func upperdir(t *testing.T, mounts []mount.Mount) string {
	t.Helper()
	if len(mounts) == 1 && mounts[0].Type == "bind" {
		return mounts[0].Source
	}
	for _, o := range mounts[0].Options {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			return dir
		}
	}
	t.Fatalf("no upper directory in %v", mounts)
	return ""
}

// layers are the directories of a committed snapshot and those below it, top
// first.
func (u *unpacking) layers(t *testing.T, name string) []string {
	t.Helper()
	key := "layers of " + name
	mounts := must[[]mount.Mount](t)(u.sn.Prepare(u.ctx, key, name))
	defer func() { check(t, u.sn.Remove(u.ctx, key)) }()
	for _, o := range mounts[0].Options {
		if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok {
			return strings.Split(dirs, ":")
		}
	}
	t.Fatalf("no lower directories in %v", mounts)
	return nil
}

// shows lists a directory of a committed snapshot.
func (u *unpacking) shows(t *testing.T, name, dir string) (names []string) {
	t.Helper()
	key := "view of " + name
	mounts := must[[]mount.Mount](t)(u.sn.View(u.ctx, key, name))
	check(t, mount.WithReadonlyTempMount(u.ctx, mounts, func(root string) (err error) {
		names, err = list(filepath.Join(root, dir))
		return err
	}))
	check(t, u.sn.Remove(u.ctx, key))
	return names
}

func list(dir string) (names []string, err error) {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

func (u *unpacking) top() string { return u.chain[len(u.chain)-1].String() }

func touchFile(elem ...string) error { return os.WriteFile(filepath.Join(elem...), nil, 0o644) }

func expect(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %q, want %q", what, got, want)
	}
}

func start(t *testing.T, n *node, img image, snapshotter string, limit int) *unpacking {
	t.Helper()
	return must[*unpacking](t)(n.unpack(t.Context(), img, snapshotter, limit))
}

// TestCopiedUpOpaque is moby#25244: layer 2 has an opaque D with b, layer 3 adds
// c to it through a mount. Kernels before 0956254a2d5b (Linux 4.8) copy the mark
// up with the directory, and b is gone from the next mount on. No kernel here
// does that, so for the stock snapshotter the mark is written by hand, exactly
// where and as such a kernel leaves it.
func TestCopiedUpOpaque(t *testing.T) {
	n := newNode(t, "ext4", "")
	two := image{{mkdir("D"), mkfile("D/a")}, {mkdir("D"), empty("D"), mkfile("D/b")}}
	addC := func(dir string) error { return touchFile(dir, "D/c") }
	copiedUp := func(upper string) error {
		return unix.Setxattr(filepath.Join(upper, "D"), "trusted.overlay.opaque", []byte("y"), 0)
	}

	s := start(t, n, two, overlayfs, 0)
	s.write(t, s.top(), "with c", addC, copiedUp)
	expect(t, "the built-in snapshotter over a buggy kernel loses b", s.shows(t, "with c", "D"), "c")

	for _, limit := range []int{0, 3} {
		u := start(t, n, two, durable, limit)
		expect(t, "two layers", u.shows(t, u.top(), "D"), "b")
		u.write(t, u.top(), "with c", addC, nil)
		expect(t, "c added through a mount", u.shows(t, "with c", "D"), "b", "c")
		u.write(t, "with c", "with d", func(dir string) error { return touchFile(dir, "D/d") }, nil)
		expect(t, "and d", u.shows(t, "with d", "D"), "b", "c", "d")

		// The same trace in the layer is right when D really was made anew, so a
		// sound kernel's marks have to be trusted.
		u.write(t, u.top(), "again", func(dir string) error {
			if err := os.RemoveAll(filepath.Join(dir, "D")); err != nil {
				return err
			}
			if err := os.Mkdir(filepath.Join(dir, "D"), 0o755); err != nil {
				return err
			}
			return addC(dir)
		}, nil)
		expect(t, "D removed and made again through a mount", u.shows(t, "again", "D"), "c")

		for what, third := range map[string]layer{
			"with an entry for D": {mkdir("D"), mkfile("D/c")}, "without one": {mkfile("D/c")},
		} {
			u := start(t, n, append(two.clone(), third), durable, limit)
			expect(t, "c added by the applier, "+what, u.shows(t, u.top(), "D"), "b", "c")
		}
	}
}

// TestWhiteoutsInParallel is containerd#13030 for every snapshotter whose name is not
// "overlayfs": a layer that is prepared without parent gets a bind mount, into
// which the applier writes no whiteouts.
func TestWhiteoutsInParallel(t *testing.T) {
	n := newNode(t, "ext4", "")
	img := image{{mkfile("a"), mkfile("b"), mkfile("d/x")}, {rm("a"), empty("d"), mkfile("d/y")}}
	s := start(t, n, img, renamed, 3)
	expect(t, "under another name, the built-in snapshotter keeps a", s.shows(t, s.top(), "."), "a", "b", "d")
	expect(t, "and d/x", s.shows(t, s.top(), "d"), "x", "y")
	for _, limit := range []int{1, 3, 8} {
		u := start(t, n, img, durable, limit)
		expect(t, "durable", u.shows(t, u.top(), "."), "b", "d")
		expect(t, "durable", u.shows(t, u.top(), "d"), "y")
	}
}

// TestOpaqueRoot: the kernel does not read the marks of a layer's root.
func TestOpaqueRoot(t *testing.T) {
	n := newNode(t, "ext4", "")
	img := image{{mkfile("old"), mkfile("d/old"), mkfile("dir/old")}, {empty("."), mkfile("new"), mkfile("d/new")}}
	for _, limit := range []int{0, 3} {
		s := start(t, n, img, overlayfs, limit)
		expect(t, "the built-in snapshotter", s.shows(t, s.top(), "."), "d", "dir", "new", "old")
		expect(t, "the built-in snapshotter", s.shows(t, s.top(), "d"), "new", "old")
		u := start(t, n, img, durable, limit)
		expect(t, "durable", u.shows(t, u.top(), "."), "d", "new")
		expect(t, "durable", u.shows(t, u.top(), "d"), "new")
		// One mark is enough: a container and a layer above see it, too.
		u.write(t, u.top(), "next", func(dir string) error { return touchFile(dir, "d/third") }, nil)
		expect(t, "durable, above", u.shows(t, "next", "d"), "new", "third")
		expect(t, "durable, above", u.shows(t, "next", "."), "d", "new")
	}
}

// TestMarksOfBothKinds is stargz-snapshotter#681. Each kind of mount takes the
// other kind's marks for ordinary attributes, and copies them up with their
// directory: D of layer 3 is then opaque to a mount of the other kind, and
// that hides b. On this kernel a mount of the same kind loses nothing; what it
// shows there is an attribute that no image should have.
func TestMarksOfBothKinds(t *testing.T) {
	n := newNode(t, "ext4", "")
	// A tar can bring a mark of its own: nothing in the applier objects.
	img := image{{mkfile("D/a")}, {mkdir("D").withXattr("user.overlay.opaque", "y"), empty("D"), mkfile("D/b")}}
	addC := func(dir string) error { return touchFile(dir, "D/c") }

	s := start(t, n, img, overlayfs, 0)
	s.write(t, s.top(), "with c", addC, nil)
	expect(t, "the built-in snapshotter, read as it was written", s.shows(t, "with c", "D"), "b", "c")
	upper := s.layers(t, "with c")[0]
	if v := xattr(t, filepath.Join(upper, "D"), "user.overlay.opaque"); v != "y" {
		t.Errorf("the kernel copied user.overlay.opaque=%q up with D, want y", v)
	}
	expect(t, "the built-in snapshotter's layers lose b in a mount with userxattr", mounted(t, s.layers(t, "with c"), "userxattr", "D"), "c")

	for _, limit := range []int{0, 3} {
		u := start(t, n, img, durable, limit)
		u.write(t, u.top(), "with c", addC, nil)
		expect(t, "durable", u.shows(t, "with c", "D"), "b", "c")
		layers := u.layers(t, "with c")
		for _, dir := range layers {
			if v := xattr(t, filepath.Join(dir, "D"), "user.overlay.opaque"); v != "" {
				t.Errorf("limit %d: %s/D has user.overlay.opaque=%q", limit, dir, v)
			}
		}
		if v := xattr(t, filepath.Join(layers[1], "D"), "trusted.overlay.opaque"); v != "y" {
			t.Errorf("limit %d: D of layer 2 has trusted.overlay.opaque=%q, want y", limit, v)
		}
		// A mount with userxattr does not know that a is hidden. It has b.
		expect(t, "durable's layers in a mount with userxattr", mounted(t, layers, "userxattr", "D"), "a", "b", "c")
	}
}

// xattr returns an extended attribute, "" when there is none.
func xattr(t *testing.T, path, name string) string {
	t.Helper()
	value := make([]byte, 1024)
	n, err := unix.Lgetxattr(path, name, value)
	switch err {
	case nil:
		return string(value[:n])
	case unix.ENODATA, unix.ENOENT:
		return ""
	}
	t.Fatalf("getxattr %s of %s: %v", name, path, err)
	return ""
}

// mounted lists a directory of a read-only mount of layers, top first.
func mounted(t *testing.T, layers []string, option, dir string) (names []string) {
	t.Helper()
	options := []string{"lowerdir=" + strings.Join(layers, ":")}
	if option != "" {
		options = append(options, option)
	}
	m := mount.Mount{Type: "overlay", Source: "overlay", Options: options}
	check(t, mount.WithReadonlyTempMount(t.Context(), []mount.Mount{m}, func(root string) (err error) {
		names, err = list(filepath.Join(root, dir))
		return err
	}))
	return names
}

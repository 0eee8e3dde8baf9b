package overlay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

const userxattr = "[snapshotter]\nmount_options = [\"userxattr\"]\n"

// TestSmuggledMarks: containerd's applier refuses trusted.* in a tar and takes
// user.overlay.*, which mounts with userxattr obey.
func TestSmuggledMarks(t *testing.T) {
	n := newNode(t, "ext4", userxattr)
	plain := image{
		{mkfile("D/a"), mkdir("E"), mkfile("E/a"), mkfile("f"), mkfile("secret")},
		{mkdir("D"), mkfile("D/b"), mkdir("E"), mkfile("w"), mkfile("f"), mksymlink("s", "f"), rm("secret")},
	}
	hostile := plain.clone()
	marks := map[string][2]string{
		"D": {"opaque", "y"}, "E": {"redirect", "/D"}, "w": {"whiteout", ""}, "f": {"metacopy", ""},
	}
	for i, e := range hostile[1] {
		if m, ok := marks[e.path]; ok && !e.marker() {
			hostile[1][i] = e.withXattr("user.overlay."+m[0], m[1])
		}
	}
	s := start(t, n, hostile, overlayfs, 0)
	expect(t, "the built-in snapshotter's layers, in a mount with userxattr", mounted(t, s.layers(t, s.top()), "userxattr", "D"), "b")
	for _, limit := range []int{0, 3} {
		u := start(t, n, hostile, durable, limit)
		got := must[view](t)(u.view())
		if text := reference(plain).view().diff(got, plain); text != "" {
			t.Errorf("limit %d: the tar's marks did something:\n%s", limit, text)
		}
		top := u.layers(t, u.top())[0]
		for path, m := range marks {
			if v := must[string](t)(xattrs(filepath.Join(top, path))); strings.Contains(v, "overlay."+m[0]) {
				t.Errorf("limit %d: %s still has the tar's user.overlay.%s", limit, path, m[0])
			}
		}
	}
	text := must[string](t)(n.daemon.Log())
	for path, m := range marks {
		if !logged(text, "/fs/"+path, "user.overlay."+m[0]) {
			t.Errorf("the log does not record that user.overlay.%s of %s was removed", m[0], path)
		}
	}
}

// logged reports whether one line of the log has all the words.
func logged(log string, words ...string) bool {
	for line := range strings.Lines(log) {
		all := strings.Contains(line, "remove")
		for _, w := range words {
			all = all && strings.Contains(line, w)
		}
		if all {
			return true
		}
	}
	return false
}

// xattrs lists the names of extended attributes, each followed by a zero byte.
func xattrs(path string) (string, error) {
	names := make([]byte, 4096)
	n, err := unix.Llistxattr(path, names)
	return string(names[:max(n, 0)]), err
}

// TestMarksThatAreRefused: a layer part of which is elsewhere, or of which this
// kernel would not know what it means, is not committed.
func TestMarksThatAreRefused(t *testing.T) {
	n := newNode(t, "ext4", "")
	u := start(t, n, image{{mkfile("D/a"), mkfile("f")}}, durable, 0)
	for _, c := range []struct{ path, name, value string }{
		{"D", "redirect", "/elsewhere"},
		{"D", "redirect", "sibling"},
		{"f", "redirect", "/elsewhere"},
		{"f", "metacopy", ""},
		{"f", "metacopy", "\x00\x04\x00\x01"},
		{"D", "opaque", "Y"},
		{"D", "opaque", "z"},
		{"D", "opaque", "yy"},
		{"D", "opaque", "y\x00"},
	} {
		t.Run(c.path+" "+c.name+"="+strings.Trim(c.value, "/\x00\x04\x01"), func(t *testing.T) {
			attr := "trusted.overlay." + c.name
			name := t.Name()
			err := u.tryWrite(t, u.top(), name, func(dir string) error {
				return errors.Join(touchFile(dir, "D/c"), os.Chmod(filepath.Join(dir, "f"), 0o600))
			}, func(upper string) error {
				return unix.Lsetxattr(filepath.Join(upper, c.path), attr, []byte(c.value), 0)
			})
			if !errdefs.IsFailedPrecondition(err) {
				t.Fatalf("commit: %v, want a failed precondition", err)
			}
			for _, word := range []string{attr, "fs/" + c.path} {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("the error does not name %q: %v", word, err)
				}
			}
			if _, err := u.sn.Stat(u.ctx, name); !errdefs.IsNotFound(err) {
				t.Errorf("stat of what was not committed: %v", err)
			}
			check(t, u.sn.Remove(u.ctx, "writing "+name))
			expect(t, "the layer below", u.shows(t, u.top(), "D"), "a")
		})
	}
}

// TestUnannouncedParent: containerd before 2.3 unpacks in parallel without announcing
// at Prepare that there will be a parent. It then gets a bind mount, into which
// its applier writes no whiteouts. The loss is refused, and the cure is named.
func TestUnannouncedParent(t *testing.T) {
	n := newNode(t, "ext4", "")
	u := start(t, n, image{{mkfile("a"), mkfile("b")}}, durable, 0)
	above := layer{rm("a")}
	desc := must[ocispec.Descriptor](t)(n.blob(u.ctx, ocispec.MediaTypeImageLayer, must[[]byte](t)(above.tar())))
	name := identity.ChainID([]digest.Digest{u.chain[0], desc.Digest}).String()
	key := fmt.Sprintf(snapshots.UnpackKeyFormat, "1-abcd", name)
	labels := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: name})
	mounts := must[[]mount.Mount](t)(u.sn.Prepare(u.ctx, key, "", labels))
	_, err := apply.NewFileSystemApplier(n.db.ContentStore()).Apply(u.ctx, desc, mounts)
	check(t, err)
	err = u.sn.Commit(u.ctx, name, key, labels, snapshots.WithParent(u.top()))
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "rebase") {
		t.Errorf("commit of a layer that lost its whiteouts: %v, want a failed precondition that names the capability", err)
	}
}

// TestXattrWhiteouts: the opaque value "x" is defined since Linux 6.8. It hides
// nothing by itself.
func TestXattrWhiteouts(t *testing.T) {
	n := newNode(t, "ext4", "")
	u := start(t, n, image{{mkfile("D/a"), mkfile("D/b")}}, durable, 0)
	u.write(t, u.top(), "x", func(dir string) error { return touchFile(dir, "D/c") }, func(upper string) error {
		return errors.Join(
			unix.Setxattr(filepath.Join(upper, "D"), "trusted.overlay.opaque", []byte("x"), 0),
			touchFile(upper, "D/a"),
			unix.Setxattr(filepath.Join(upper, "D/a"), "trusted.overlay.whiteout", nil, 0))
	})
	expect(t, "a whiteout made of an attribute", u.shows(t, "x", "D"), "b", "c")
}

// TestWritableMounts: what is written through them is whole by itself, whatever
// the kernel's defaults are.
func TestWritableMounts(t *testing.T) {
	n := newNode(t, "ext4", "")
	for what, limit := range map[string]int{"sequentially": 0, "in parallel": 3} {
		u := start(t, n, image{{mkfile("D/a"), mkfile("f")}, {mkfile("g")}}, durable, limit)
		mounts := must[[]mount.Mount](t)(u.sn.Prepare(u.ctx, "container", u.top()))
		options := strings.Join(mounts[0].Options, ",")
		for _, o := range []string{"redirect_dir=off", "metacopy=off"} {
			if !strings.Contains(options, o) {
				t.Errorf("unpacked %s: a writable mount has the options %s, without %s", what, options, o)
			}
		}
		check(t, mount.WithTempMount(u.ctx, mounts, func(dir string) error {
			if err := os.Rename(filepath.Join(dir, "D"), filepath.Join(dir, "moved")); !errors.Is(err, unix.EXDEV) {
				t.Errorf("rename of a lower directory: %v, want EXDEV, at which mv copies", err)
			}
			return os.Chmod(filepath.Join(dir, "f"), 0o600)
		}))
		upper := upperdir(t, mounts)
		if v := must[string](t)(xattrs(filepath.Join(upper, "f"))); strings.Contains(v, "metacopy") {
			t.Error("a changed file was copied up without its content")
		}
		if body := must[[]byte](t)(os.ReadFile(filepath.Join(upper, "f"))); string(body) != "content of f" {
			t.Errorf("a changed file was copied up as %q", body)
		}
	}
}

// TestUserXattrDifferential: with userxattr in the configuration the applier
// still writes marks of the trusted kind. A layer means the same all the same.
func TestUserXattrDifferential(t *testing.T) {
	n := newNode(t, "ext4", userxattr)
	for i := range uint64(40) {
		if !differential(t, n, i, ways[:2]) {
			break
		}
	}
}

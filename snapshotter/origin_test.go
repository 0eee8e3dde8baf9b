package snapshotter

import (
	"archive/tar"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
)

// TestReadersDisturbNothing: something that reads every directory during the
// extraction, and touches its status, changes no decision.
func TestReadersDisturbNothing(t *testing.T) {
	for _, parallel := range []bool{false, true} {
		s := start(t, t.TempDir())
		extract(t, s, 1, false, dir("opaque", 0o700, 5), dir("plain", 0o700, 5), dir("entry", 0o700, 5), dir("marked", 0o700, 5)).mustCommit(t)
		e := extract(t, s, 2, parallel, file("opaque/new"), opaque("opaque"), file("plain/new"), dir("entry", 0o755, 0), file("entry/new"),
			dir("marked", 0o755, 0), opaque("marked"))
		for _, name := range []string{"opaque", "plain", "entry", "marked"} {
			now := []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_OMIT}} // as a reader leaves it
			if err := unix.UtimesNanoAt(unix.AT_FDCWD, e.path(name), now, 0); err != nil {
				t.Fatal(err)
			}
		}
		e.mustCommit(t)
		for name, want := range map[string]string{"opaque": "700 5", "plain": "700 5", "entry": "755 0", "marked": "755 0"} {
			entry, err := seal.Read(e.path(name), name)
			if err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprintf("%o %d", entry.Stat.Mode&0o7777, entry.Stat.Uid); got != want {
				t.Errorf("parallel %v: %s is %s, want %s", parallel, name, got, want)
			}
		}
	}
}

// TestInheritedInside: what an invented directory has inherited from the one
// around it in its own layer stays, as with the built-in snapshotter, unless the
// parent chain shows the directory.
func TestInheritedInside(t *testing.T) {
	s := start(t, t.TempDir())
	extract(t, s, 1, false, dir("g/below", 0o700, 5)).mustCommit(t)
	around := dir("g", 0o3777, 50)
	e := extract(t, s, 2, true, around, file("g/inv/file"), file("g/below/file")).mustCommit(t)
	for name, want := range map[string]string{"g": "3777 50:50", "g/inv": "755 0:50", "g/below": "700 5:5"} {
		entry, err := seal.Read(e.path(name), name)
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprintf("%o %d:%d", entry.Stat.Mode&0o7777, entry.Stat.Uid, entry.Stat.Gid); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
}

// TestUsageLeavesNoTrace: Usage counts what containerd's snapshotter counts, and
// reads directories without moving their times of access.
func TestUsageLeavesNoTrace(t *testing.T) {
	s := start(t, t.TempDir())
	extract(t, s, 1, false, file("low")).mustCommit(t)
	e := extract(t, s, 2, false, dir("a/b", 0o755, 0), file("a/b/one"), tar.Header{Typeflag: tar.TypeLink, Name: "a/two", Linkname: "a/b/one"},
		tar.Header{Typeflag: tar.TypeSymlink, Name: "link", Linkname: "a"}, tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o600})
	if err := os.WriteFile(e.path("big"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	old := unix.Timespec{Sec: 1} // relatime moves what is older than the last change
	for _, name := range []string{".", "a", "a/b"} {
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, e.path(name), []unix.Timespec{old, {Nsec: unix.UTIME_OMIT}}, 0); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.Usage(t.Context(), e.key)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".", "a", "a/b"} {
		var st unix.Stat_t
		if err := unix.Lstat(e.path(name), &st); err != nil || st.Atim != old {
			t.Errorf("the time of access of %s is %v, %v", name, st.Atim, err)
		}
	}
	want, err := s.overlay.Usage(t.Context(), e.key)
	if err != nil || got != want {
		t.Errorf("%+v, containerd counts %+v, %v", got, want, err)
	}
	if got.Inodes != 7 || got.Size < 1<<20 {
		t.Errorf("%+v", got)
	}

	// Something mounted inside is not part of the snapshot.
	if err := unix.Mount(s.cfg.Root, e.path("a/b"), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	mounted, err := s.Usage(t.Context(), e.key)
	if err := errors.Join(err, unix.Unmount(e.path("a/b"), 0)); err != nil {
		t.Fatal(err)
	}
	if mounted.Inodes >= got.Inodes || mounted.Size >= got.Size+1<<20 {
		t.Errorf("with a mount inside: %+v, before: %+v", mounted, got)
	}
	if err := os.RemoveAll(e.upper); err != nil {
		t.Fatal(err)
	}
	if u, err := s.Usage(t.Context(), e.key); err != nil || u.Inodes != 0 {
		t.Errorf("of nothing: %+v, %v", u, err)
	}
}

// TestHealKeepsLabels: a healed layer can be read by the containers that could
// read the old one.
func TestHealKeepsLabels(t *testing.T) {
	m := newMachine(t, 1)
	s := m.boot(false)
	m.pull(s)
	tree := m.tree(s, 0)
	for rel, value := range map[string]string{".": "of the root", "dir": "of the directory", "dir/shared": "of the file"} {
		setMark(t, filepath.Join(tree, rel), "security.selinux", value)
	}
	if err := os.Remove(filepath.Join(tree, "link")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.layers.Repair(t.Context(), layers.RepairOptions{Apply: true}); err != nil {
		t.Fatal(err)
	}
	m.wantWhole(s)
	for rel, want := range map[string]string{".": "of the root", "dir": "of the directory", "dir/shared": "of the file", "opaque/f0": "of the root", "link": "of the root"} {
		if got := xattrsOf(t, filepath.Join(tree, rel)); got != "[{security.selinux "+want+"}]" {
			t.Errorf("%s: %s, want %s", rel, got, want)
		}
	}
}

package snapshotter

import (
	"archive/tar"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

// attributesAt are the mode, owner and attributes of a directory, as text.
func attributesAt(t *testing.T, path string) string {
	t.Helper()
	e, err := seal.Read(path, ".")
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%o %d:%d %.40v", e.Stat.Mode&^unix.S_IFMT, e.Stat.Uid, e.Stat.Gid, inheritable(&e))
}

// private is a directory that nobody else may read.
func private(name string) tar.Header {
	h := dir(name, 0o700, 1000)
	h.Gid = 1001
	h.PAXRecords = map[string]string{"SCHILY.xattr.user.kind": "d"}
	return h
}

const isPrivate = "700 1000:1001 [{user.kind d}]"

// TestInheritFromSeals: what a parent has lost, or what was changed in it, since it
// was sealed makes no difference to a layer above.
func TestInheritFromSeals(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"gone":          os.RemoveAll,
		"another mode":  func(path string) error { return os.Chmod(path, 0o777) },
		"another owner": func(path string) error { return os.Chown(path, 0, 0) },
		"no attribute":  func(path string) error { return unix.Removexattr(path, "user.kind") },
		"more":          func(path string) error { return unix.Setxattr(path, "user.stamp", []byte("x"), 0) },
		"a file":        func(path string) error { return errors.Join(os.RemoveAll(path), os.WriteFile(path, nil, 0o600)) },
		"made opaque":   func(path string) error { return unix.Setxattr(path, "trusted.overlay.opaque", []byte("y"), 0) },
		"whole":         func(path string) error { return nil },
		"and more gone": func(path string) error { return os.RemoveAll(filepath.Dir(path)) },
	} {
		for _, parallel := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/parallel=%v", name, parallel), func(t *testing.T) {
				s := start(t, t.TempDir())
				base := extract(t, s, 1, false, dir("a", 0o711, 5), private("a/priv"), dir("a/priv/in", 0o500, 7), file("a/priv/in/f")).mustCommit(t)
				extract(t, s, 2, parallel, file("elsewhere")).mustCommit(t)
				if err := spoil(base.path("a/priv")); err != nil {
					t.Fatal(err)
				}
				e := extract(t, s, 3, parallel, file("a/priv/in/new"), file("a/own/new")).mustCommit(t)
				for rel, want := range map[string]string{"a": "711 5:5 []", "a/priv": isPrivate, "a/priv/in": "500 7:7 []", "a/own": "755 0:0 []"} {
					if got := attributesAt(t, e.path(rel)); got != want {
						t.Errorf("%s: %s, want %s", rel, got, want)
					}
				}
				if n := e.marks(t).Inherited; n != 3 {
					t.Errorf("the record counts %d directories", n)
				}
			})
		}
	}
}

// TestHiddenByOpaqueRoot: an opaque root hides the names that its parent has lost
// meanwhile: they come back when the parent is healed.
func TestHiddenByOpaqueRoot(t *testing.T) {
	for _, parallel := range []bool{false, true} {
		s := start(t, t.TempDir())
		base := extract(t, s, 1, false, dir("both", 0o700, 5), file("both/low"), dir("low", 0o700, 0), file("dead")).mustCommit(t)
		extract(t, s, 2, parallel, file(".wh.dead")).mustCommit(t)
		for _, name := range []string{"both", "low", "dead"} {
			if err := os.RemoveAll(base.path(name)); err != nil {
				t.Fatal(err)
			}
		}
		e := extract(t, s, 3, parallel, opaque("."), file("both/own")).mustCommit(t)
		var st unix.Stat_t
		if err := unix.Lstat(e.path("low"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
			t.Errorf("parallel %v: no whiteout of a name that the parent has lost: %v", parallel, err)
		}
		if _, err := os.Lstat(e.path("dead")); !isNotExist(err) {
			t.Errorf("parallel %v: a whiteout of a name that was hidden before: %v", parallel, err)
		}
		if got := xattrsOf(t, e.path("both")); got != "[{trusted.overlay.opaque y}]" {
			t.Errorf("parallel %v: both has %s", parallel, got)
		}
	}
}

// TestRootOwner: the root of a layer has the owner of its parent's root by the seal,
// as containerd gives it that of the disk.
func TestRootOwner(t *testing.T) {
	for _, parallel := range []bool{false, true} {
		s := start(t, t.TempDir())
		key := "container"
		mounts, err := s.Prepare(t.Context(), key, "")
		if err != nil {
			t.Fatal(err)
		}
		root := mounts[0].Source
		if err := errors.Join(os.Chown(root, 5, 6), s.Commit(t.Context(), chainID(1), key), os.Chown(root, 8, 9)); err != nil {
			t.Fatal(err)
		}
		e := extract(t, s, 2, parallel, file("new")).mustCommit(t)
		if got := attributesAt(t, e.path(".")); got != "755 5:6 []" {
			t.Errorf("parallel %v: the root is %s", parallel, got)
		}
	}
}

// TestInheritUnsealed: a layer that another snapshotter has committed has no seal, and
// the disk is all there is; the layers around it have theirs.
func TestInheritUnsealed(t *testing.T) {
	root := t.TempDir()
	s := start(t, root)
	base := extract(t, s, 1, false, private("sealed"), private("both"), private("hidden")).mustCommit(t)
	stop(t, s)
	theirs := builtIn(t, root)
	mounts, err := theirs.Prepare(t.Context(), "theirs", chainID(1))
	if err != nil {
		t.Fatal(err)
	}
	upper := treetest.UpperDir(mounts)
	for name, mode := range map[string]os.FileMode{"both": 0o711, "unsealed": 0o750, "hidden": 0} {
		path := filepath.Join(upper, name)
		if name == "hidden" {
			err = unix.Mknod(path, unix.S_IFCHR, 0)
		} else {
			err = errors.Join(os.Mkdir(path, 0o700), os.Chmod(path, mode))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(theirs.Commit(t.Context(), chainID(2), "theirs"), theirs.Close(), os.RemoveAll(base.path("sealed"))); err != nil {
		t.Fatal(err)
	}
	s = start(t, root)
	e := extract(t, s, 3, false, file("sealed/x"), file("both/x"), file("unsealed/x"), file("hidden/x")).mustCommit(t)
	for rel, want := range map[string]string{"sealed": isPrivate, "both": "711 0:0 []", "unsealed": "750 0:0 []", "hidden": "755 0:0 []"} {
		if got := attributesAt(t, e.path(rel)); got != want {
			t.Errorf("%s: %s, want %s", rel, got, want)
		}
	}
}

// TestInheritReadsNoMore: a seal below the last one that is needed is not read.
func TestInheritReadsNoMore(t *testing.T) {
	for _, parallel := range []bool{false, true} {
		s := start(t, t.TempDir())
		base := extract(t, s, 1, false, dir("priv", 0o711, 7), dir("low", 0o711, 7)).mustCommit(t)
		extract(t, s, 2, parallel, private("priv")).mustCommit(t)
		if err := os.Remove(filepath.Join(filepath.Dir(base.upper), layout.SealFile)); err != nil {
			t.Fatal(err)
		}
		// A directory that has an entry is not asked about, whatever it is.
		e := extract(t, s, 3, parallel, dir("entry", 0o700, 1), file("priv/x")).mustCommit(t)
		if got := attributesAt(t, e.path("priv")); got != isPrivate {
			t.Errorf("parallel %v: priv is %s", parallel, got)
		}
		if err := extract(t, s, 4, parallel, file("low/x")).commit(t); !errdefs.IsUnavailable(err) {
			t.Errorf("parallel %v: with the seal that is needed: %v", parallel, err)
		}
	}
}

// BenchmarkInherit commits a layer with an invented directory on a chain of 10 layers,
// which have 30,000 entries together, and one that has an entry for it.
func BenchmarkInherit(b *testing.B) {
	var chain [][]tar.Header
	for i := range 10 {
		entries := []tar.Header{dir("usr", 0o711, 1), dir(fmt.Sprint("usr/own", i), 0o700, i)}
		for n := range 2998 {
			entries = append(entries, file(fmt.Sprintf("usr/own%d/library%04d.so.1", i, n)))
		}
		chain = append(chain, entries)
	}
	for _, c := range []struct {
		name  string
		entry []tar.Header
	}{
		{"entry", []tar.Header{dir("usr", 0o711, 1), dir("usr/own0", 0o700, 0)}}, {"invented", nil},
	} {
		b.Run(c.name, func(b *testing.B) {
			if os.Geteuid() != 0 {
				b.Skip("overlay mounts need root")
			}
			s, err := New(b.Context(), Config{Root: b.TempDir(), NoBackground: true})
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			commit := func(n int, entries []tar.Header) time.Duration {
				key, parent := fmt.Sprintf("extract-%d-x %s", n, chainID(n)), ""
				if n > 0 {
					parent = chainID(min(n, len(chain)) - 1)
				}
				mounts, err := s.Prepare(b.Context(), key, parent)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := archive.Apply(b.Context(), treetest.UpperDir(mounts), tarOf(b, entries), archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)); err != nil {
					b.Fatal(err)
				}
				began := time.Now()
				if err := s.Commit(b.Context(), chainID(n), key); err != nil {
					b.Fatal(err)
				}
				return time.Since(began)
			}
			for n, entries := range chain {
				commit(n, entries)
			}
			var took []time.Duration
			for n := len(chain); b.Loop(); n++ {
				took = append(took, commit(n, append(slices.Clone(c.entry), file("usr/own0/new"), file("usr/new"))))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms/commit")
		})
	}
}

package snapshotter

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
)

// Entries of tars.
var (
	tarOf  = treetest.TarOf
	dir    = treetest.TarDir
	file   = treetest.TarFile
	opaque = treetest.TarOpaque
)

func setMark(t *testing.T, path, name, value string) {
	t.Helper()
	if err := unix.Lsetxattr(path, name, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

// inheritable are the attributes that copying a directory up would bring along.
func inheritable(e *seal.Entry) []seal.Xattr {
	return slices.DeleteFunc(slices.Clone(e.Xattrs), func(x seal.Xattr) bool { return !seal.Inheritable(x.Name) })
}

func xattrsOf(t *testing.T, path string) string {
	t.Helper()
	e, err := seal.Read(path, ".")
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(e.Xattrs)
}

// chainID makes names that look like containerd's.
func chainID(n int) string { return fmt.Sprintf("sha256:%064x", n) }

// extraction is a layer that is being unpacked as containerd does it.
type extraction struct {
	s      *Snapshotter
	key    string
	name   string
	parent string // named at Commit
	upper  string
	labels snapshots.Opt
	mounts []mount.Mount
}

// extract prepares layer n, on layer n-1 or, in parallel, on nothing yet, and
// applies a tar to it with containerd's applier.
func extract(t *testing.T, s *Snapshotter, n int, parallel bool, entries ...tar.Header) *extraction {
	t.Helper()
	e := &extraction{s: s, key: "extract-1-abcd " + chainID(n), name: chainID(n)}
	labels := map[string]string{layout.LabelTarget: chainID(n)}
	parent := ""
	if n > 1 {
		parent = chainID(n - 1)
		labels[layout.LabelParentChainID] = parent
	}
	e.labels = snapshots.WithLabels(labels)
	if parallel {
		e.parent, parent = parent, ""
	}
	mounts, err := s.Prepare(t.Context(), e.key, parent, e.labels)
	if err != nil {
		t.Fatal(err)
	}
	e.mounts = mounts
	if throughApply {
		e.upper = treetest.UpperDir(mounts)
		if err := e.apply(t, entries...); err != nil {
			t.Fatal(err)
		}
		return e
	}
	var opts []archive.ApplyOpt
	if mounts[0].Type == "overlay" {
		e.upper = overlayutil.ParseOptions(mounts[0].Options).Upper
		opts = append(opts, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
		for _, option := range mounts[0].Options { // as getOverlayPath in core/diff/apply
			if lower, ok := strings.CutPrefix(option, "lowerdir="); ok {
				opts = append(opts, archive.WithParents(strings.Split(lower, ":")))
			}
		}
	} else {
		e.upper = mounts[0].Source
	}
	if _, err := archive.Apply(t.Context(), e.upper, tarOf(t, entries), opts...); err != nil {
		t.Fatal(err)
	}
	return e
}

func (e *extraction) commit(t *testing.T) error {
	t.Helper()
	return e.commitAs(t.Context(), e.name)
}

func (e *extraction) commitAs(ctx context.Context, name string) error {
	opts := []snapshots.Opt{e.labels}
	if e.parent != "" {
		opts = append(opts, snapshots.WithParent(e.parent))
	}
	return e.s.Commit(ctx, name, e.key, opts...)
}

func (e *extraction) mustCommit(t *testing.T) *extraction {
	t.Helper()
	if err := e.commit(t); err != nil {
		t.Fatal(err)
	}
	return e
}

func (e *extraction) path(rel string) string { return filepath.Join(e.upper, rel) }

func (e *extraction) marks(t *testing.T) layout.OverlayMarks {
	t.Helper()
	r, err := layout.ReadRecord(filepath.Dir(e.upper))
	if err != nil {
		t.Fatal(err)
	}
	return *r.Overlay
}

// TestInherit: directories that the tar has no entry for get what the parent
// chain shows for them, and no others are touched.
func TestInherit(t *testing.T) {
	acl := map[string]string{"SCHILY.xattr.user.kind": "d"}
	owned := dir("a/b", 0o2750, 1234)
	owned.PAXRecords = acl
	bottom := []tar.Header{dir("a", 0, 7), owned, file("a/b/one"), dir("kept", 0o700, 5), dir("swept/inner", 0o700, 5), dir("swept/marked", 0o700, 5), dir("own/marked", 0o700, 5), dir("gone", 0o700, 5), dir("file", 0o700, 5)}
	middle := []tar.Header{dir("swept", 0o711, 6), opaque("swept"), file(".wh.gone"), file("file")}
	for _, parallel := range []bool{false, true} {
		t.Run(map[bool]string{false: "sequential", true: "parallel"}[parallel], func(t *testing.T) {
			s := start(t, t.TempDir())
			extract(t, s, 1, false, bottom...).mustCommit(t)
			extract(t, s, 2, parallel, middle...).mustCommit(t)
			e := extract(t, s, 3, parallel,
				file("a/b/two"), dir("kept", 0o755, 0), file("swept/inner/x"), file("gone/x"), file("new/x"),
				file("file/x"), opaque("a/b"), opaque("swept/marked"), opaque("own"), opaque("own/marked")).mustCommit(t)
			for rel, want := range map[string]string{
				"a":            "0 7:7 []",
				"a/b":          "2750 1234:1234 [{user.kind d}]",
				"kept":         "755 0:0 []", // the tar says so
				"swept":        "711 6:6 []",
				"swept/inner":  "755 0:0 []", // hidden by the opaque directory
				"swept/marked": "755 0:0 []",
				"own/marked":   "755 0:0 []", // hidden by the layer itself
				"gone":         "755 0:0 []",
				"new":          "755 0:0 []",
				"file":         "755 0:0 []",
			} {
				entry, err := seal.Read(e.path(rel), rel)
				if err != nil {
					t.Error(err)
					continue
				}
				st := entry.Stat
				if got := fmt.Sprintf("%o %d:%d %v", st.Mode&^unix.S_IFMT, st.Uid, st.Gid, inheritable(&entry)); got != want {
					t.Errorf("%s: %s, want %s", rel, got, want)
				}
			}
		})
	}
}

// TestOpaqueRoot: the kernel ignores the mark on a layer's root.
func TestOpaqueRoot(t *testing.T) {
	for _, parallel := range []bool{false, true} {
		s := start(t, t.TempDir())
		extract(t, s, 1, false, dir("both", 0o700, 5), file("both/low"), dir("low", 0o700, 0), file("dead")).mustCommit(t)
		extract(t, s, 2, parallel, file(".wh.dead"), file("plain")).mustCommit(t)
		e := extract(t, s, 3, parallel, opaque("."), file("both/own"), file("own")).mustCommit(t)
		for rel, want := range map[string]string{"low": "c", "plain": "c", "dead": "-", "both": "d", "own": "f"} {
			st, err := os.Lstat(e.path(rel))
			got := "f"
			switch {
			case errors.Is(err, os.ErrNotExist):
				got = "-"
			case err != nil:
				t.Fatal(err)
			case st.IsDir():
				got = "d"
			case st.Mode()&os.ModeCharDevice != 0:
				got = "c"
			}
			if got != want {
				t.Errorf("parallel %v: %s is %s, want %s", parallel, rel, got, want)
			}
		}
		if mark, err := overlayutil.Trusted.Get(e.path("both"), "opaque"); err != nil || mark != "y" {
			t.Errorf("parallel %v: both is not opaque: %q, %v", parallel, mark, err)
		}
		if st, err := os.Lstat(e.path("both")); err != nil || st.Mode().Perm() != 0o755 {
			t.Errorf("parallel %v: a directory that an opaque root hides was inherited: %v, %v", parallel, st.Mode(), err)
		}
		if m := e.marks(t); !m.Root || m.Whiteouts != 2 || m.Opaque != 1 {
			t.Errorf("parallel %v: record says %+v", parallel, m)
		}
	}
}

// TestMarks: opaque marks end up in the space that the mounts use, and nothing
// else of overlay's is left that could mean something else one day.
func TestMarks(t *testing.T) {
	smuggled := dir("d", 0o755, 0)
	smuggled.PAXRecords = map[string]string{"SCHILY.xattr.user.overlay.opaque": "y", "SCHILY.xattr.user.overlay.redirect": "/etc"}
	for name, c := range map[string]struct {
		options []string
		entries []tar.Header
		want    string
	}{
		"trusted":                          {nil, []tar.Header{dir("d", 0o755, 0), opaque("d")}, "[{trusted.overlay.opaque y}]"},
		"trusted and smuggled":             {nil, []tar.Header{smuggled}, "[{user.overlay.redirect /etc}]"},
		"trusted and both":                 {nil, []tar.Header{smuggled, opaque("d")}, "[{trusted.overlay.opaque y} {user.overlay.redirect /etc}]"},
		"userxattr":                        {[]string{"userxattr"}, []tar.Header{dir("d", 0o755, 0), opaque("d")}, "[{user.overlay.opaque y}]"},
		"userxattr and smuggled":           {[]string{"userxattr"}, []tar.Header{smuggled}, "[]"},
		"userxattr and smuggled and meant": {[]string{"userxattr"}, []tar.Header{smuggled, opaque("d")}, "[{user.overlay.opaque y}]"},
	} {
		t.Run(name, func(t *testing.T) {
			quiet(t)
			s, err := New(t.Context(), Config{Root: t.TempDir(), MountOptions: c.options})
			if err != nil {
				t.Fatal(err)
			}
			defer stop(t, s)
			extract(t, s, 1, false, dir("d", 0o700, 0)).mustCommit(t)
			for i, parallel := range []bool{false, true} {
				e := extract(t, s, 2+i, parallel, c.entries...).mustCommit(t)
				if got := xattrsOf(t, e.path("d")); got != c.want {
					t.Errorf("parallel %v: %s, want %s", parallel, got, c.want)
				}
			}
		})
	}
}

// TestRefusedMarks: what makes a layer depend on others, or means nothing, is
// refused for good.
func TestRefusedMarks(t *testing.T) {
	for name, c := range map[string]struct{ mark, value, want string }{
		"redirect":  {"trusted.overlay.redirect", "/elsewhere", "not whole by itself"},
		"metacopy":  {"trusted.overlay.metacopy", "", "not whole by itself"},
		"undefined": {"trusted.overlay.opaque", "Y", "means nothing"},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, t.TempDir())
			mounts, err := s.Prepare(t.Context(), "container", "")
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(mounts[0].Source, "d")
			if err := os.Mkdir(path, 0o755); err != nil {
				t.Fatal(err)
			}
			setMark(t, path, c.mark, c.value)
			err = s.Commit(t.Context(), "name", "container")
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v", err)
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if err := s.Commit(t.Context(), "name", "container"); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("a refused snapshot was committed later: %v", err)
			}
		})
	}
}

// TestOpaqueCopiedUp: no kernel at hand has the bug, so the test says that this
// one has, and leaves what such a kernel leaves: the mark of the lower
// directory on the upper one.
func TestOpaqueCopiedUp(t *testing.T) {
	for _, buggy := range []bool{false, true} {
		s := start(t, t.TempDir())
		extract(t, s, 1, false, dir("d", 0o755, 0), file("d/a")).mustCommit(t)
		extract(t, s, 2, false, dir("d", 0o755, 0), opaque("d"), file("d/b")).mustCommit(t)
		s.features.OpaqueCopiedUp = buggy
		mounts, err := s.Prepare(t.Context(), "container", chainID(2))
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(overlayutil.ParseOptions(mounts[0].Options).Upper, "d")
		if err := os.Mkdir(path, 0o755); err != nil {
			t.Fatal(err)
		}
		setMark(t, path, "trusted.overlay.opaque", "y")
		err = s.Commit(t.Context(), "name", "container")
		if buggy != errdefs.IsFailedPrecondition(err) || !buggy && err != nil {
			t.Errorf("buggy kernel %v: %v", buggy, err)
		}
		// A layer that was extracted never went through a mount.
		extract(t, s, 3, false, dir("d", 0o755, 0), opaque("d"), file("d/c")).mustCommit(t)
	}
}

// TestParallelMounts: an extraction without its parent gets a mount that makes
// the applier convert whiteouts, and that can be mounted.
func TestParallelMounts(t *testing.T) {
	s := start(t, t.TempDir())
	extract(t, s, 1, false, file("a")).mustCommit(t)
	e := extract(t, s, 2, true, file(".wh.a"), file("b"))
	mounts, err := s.Mounts(t.Context(), e.key)
	if err != nil {
		t.Fatal(err)
	}
	if len(mounts) != 1 || mounts[0].Type != "overlay" || mounts[0].ReadOnly() {
		t.Fatalf("mounts %+v", mounts)
	}
	target := t.TempDir()
	if err := mounts[0].Mount(target); err != nil {
		t.Fatal(err)
	}
	_, err = os.Lstat(filepath.Join(target, "b"))
	if err := errors.Join(err, unix.Unmount(target, 0)); err != nil {
		t.Error(err)
	}
	e.mustCommit(t)
	var st unix.Stat_t
	if err := unix.Lstat(e.path("a"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		t.Errorf("no whiteout: %o, %v", st.Mode, err)
	}
}

// TestParallelRefused: a client that gives the parent at Commit only, as
// containerd before 2.3 does, had a bind mount, and its applier has thrown the
// whiteouts away.
func TestParallelRefused(t *testing.T) {
	s := start(t, t.TempDir())
	extract(t, s, 1, false, file("a")).mustCommit(t)
	key := "extract-1-abcd " + chainID(2)
	if _, err := s.Prepare(t.Context(), key, ""); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), chainID(2), key, snapshots.WithParent(chainID(1))); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "rebase") {
		t.Errorf("got %v", err)
	}
}

// TestOtherParent: a Commit that failed before it changed anything leaves the
// layer as it was, and it may be committed under another name and on another
// parent.
func TestOtherParent(t *testing.T) {
	s := start(t, t.TempDir())
	extract(t, s, 1, false, dir("d", 0o700, 5)).mustCommit(t)
	if _, err := s.Prepare(t.Context(), "taken", ""); err != nil {
		t.Fatal(err)
	}
	e := extract(t, s, 2, true, file("d/x"))
	e.name = "taken"
	if err := e.commit(t); !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	e.name, e.parent = chainID(2), "missing"
	if err := e.commit(t); !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	e.parent = chainID(1)
	e.mustCommit(t)
}

// TestNoSecondPass: what Commit changes in an extracted tree cannot be told from
// what the applier left there, so a Commit that changed something and failed is
// the last one. Which change it was makes no difference.
func TestNoSecondPass(t *testing.T) {
	for name, c := range map[string]struct {
		options  []string
		parallel bool
		entries  []tar.Header
		last     bool // nothing more may be committed
	}{
		"moved":     {[]string{"userxattr"}, false, []tar.Header{dir("d", 0o755, 0), opaque("d"), file("d/new")}, true},
		"removed":   {nil, false, []tar.Header{withXattr(dir("e", 0o755, 0), "user.overlay.opaque")}, true},
		"smuggled":  {[]string{"userxattr"}, false, []tar.Header{withXattr(dir("e", 0o755, 0), "user.overlay.opaque")}, true},
		"inherited": {nil, false, []tar.Header{file("d/new")}, true},
		"root":      {nil, false, []tar.Header{opaque("."), file("new")}, true},
		"closed":    {nil, true, []tar.Header{opaque("."), file("d/new"), file("old")}, true},
		"unchanged": {nil, false, []tar.Header{dir("d", 0o755, 0), file("d/new"), opaque("d"), file(".wh.old")}, false},
	} {
		t.Run(name, func(t *testing.T) {
			quiet(t)
			s, err := New(t.Context(), Config{Root: t.TempDir(), MountOptions: c.options})
			if err != nil {
				t.Fatal(err)
			}
			defer stop(t, s)
			extract(t, s, 1, false, dir("d", 0o700, 5), file("d/low"), file("old")).mustCommit(t)
			e := extract(t, s, 2, c.parallel, c.entries...)

			// The client gives up while Commit waits for the sync of another.
			ctx, cancel := context.WithCancel(t.Context())
			release := holdGate(t, s)
			failed := make(chan error, 1)
			go func() { failed <- e.commitAs(ctx, e.name) }()
			waitForWalk(t, e.upper)
			cancel()
			release()
			if err := <-failed; !errors.Is(err, context.Canceled) {
				t.Fatalf("the first Commit: %v", err)
			}

			err = e.commit(t)
			if !c.last {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errdefs.IsFailedPrecondition(err) || errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "extract again") {
				t.Errorf("the second Commit: %v", err)
			}
			if err := s.Remove(t.Context(), e.key); err != nil {
				t.Fatal(err)
			}
			extract(t, s, 2, c.parallel, c.entries...).mustCommit(t)
		})
	}
}

// holdGate makes every other Commit wait before its sync, until release is called.
func holdGate(t *testing.T, s *Snapshotter) (release func()) {
	t.Helper()
	w, err := s.gate.OpenWriter(s.root.Snapshots(), 0)
	if err != nil {
		t.Fatal(err)
	}
	held, end, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- s.gate.Synced(context.Background(), w, func(context.Context) error {
			close(held)
			<-end
			return nil
		})
	}()
	<-held
	return func() {
		close(end)
		if err := errors.Join(<-ended, w.Close()); err != nil {
			t.Error(err)
		}
	}
}

// TestContainerStaysCommittable: of a container only what says nothing is
// removed, and its Commit may be tried again.
func TestContainerStaysCommittable(t *testing.T) {
	s := start(t, t.TempDir())
	addLayer(t, s, "base", "")
	mounts, err := s.Prepare(t.Context(), "container", "base")
	if err != nil {
		t.Fatal(err)
	}
	upper := overlayutil.ParseOptions(mounts[0].Options).Upper
	for _, name := range []string{"trusted.overlay.opaque", "user.overlay.opaque"} {
		path := filepath.Join(upper, "d")
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		setMark(t, path, name, "y")
	}
	ctx, cancel := context.WithCancel(t.Context())
	release := holdGate(t, s)
	failed := make(chan error, 1)
	go func() { failed <- s.Commit(ctx, "name", "container") }()
	waitForWalk(t, upper)
	if got := xattrsOf(t, filepath.Join(upper, "d")); got != "[{trusted.overlay.opaque y}]" {
		t.Errorf("the first Commit leaves %s", got)
	}
	cancel()
	release()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Fatalf("the first Commit: %v", err)
	}
	if err := s.Commit(t.Context(), "name", "container"); err != nil {
		t.Error(err)
	}
}

// waitForWalk waits until the Commit of a snapshot has walked its tree and
// written its record.
func waitForWalk(t *testing.T, upper string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if r, err := layout.ReadRecord(filepath.Dir(upper)); err == nil && r.Kind == "committed" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("Commit does not get to its sync")
		}
	}
}

func withXattr(h tar.Header, name string) tar.Header {
	h.PAXRecords = map[string]string{"SCHILY.xattr." + name: "y"}
	return h
}

// TestWritableMounts: a layer written through a mount must be whole by itself.
func TestWritableMounts(t *testing.T) {
	s := start(t, t.TempDir())
	addLayer(t, s, "base", "")
	mounts, err := s.Prepare(t.Context(), "container", "base")
	if err != nil {
		t.Fatal(err)
	}
	options := strings.Join(mounts[0].Options, ",")
	if !strings.HasSuffix(options, "redirect_dir=off,metacopy=off") || !strings.Contains(options, "index=off") {
		t.Errorf("options %s", options)
	}
	again, err := s.Mounts(t.Context(), "container")
	if err != nil || strings.Join(again[0].Options, ",") != options {
		t.Errorf("mounts differ later: %v, %v", again, err)
	}
}

// TestEmptyStaysEmpty: what somebody puts into the empty lower directory does
// not show for longer than until the next start.
func TestEmptyStaysEmpty(t *testing.T) {
	root := t.TempDir()
	s := start(t, root)
	if err := os.WriteFile(filepath.Join(s.root.Empty(), "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	stop(t, s)
	s = start(t, root)
	if left, err := os.ReadDir(s.root.Empty()); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
}

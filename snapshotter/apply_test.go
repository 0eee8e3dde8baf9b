package snapshotter

import (
	"archive/tar"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/contents"
	applier "github.com/durable-snapshotter/durable-snapshotter/internal/extract"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/marks"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
	"github.com/durable-snapshotter/durable-snapshotter/internal/unpack"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// throughApply has extract use Apply.
var throughApply bool

// apply applies entries to the snapshot by Apply.
func (e *extraction) apply(t *testing.T, entries ...tar.Header) error {
	t.Helper()
	return e.s.Apply(t.Context(), e.mounts, func(ctx context.Context, root string, whiteouts applier.Whiteouts, files *fsync.Files) (*unpack.Extracted, error) {
		dirs := marks.NewTarDirs(root)
		r, err := applier.Apply(ctx, applier.Options{Dir: root, Tar: tarOf(t, entries), Whiteouts: whiteouts, Digests: true, Directory: dirs.Add, Files: files})
		return &unpack.Extracted{Dirs: dirs, Sums: r.Sums, Size: r.Size}, err
	})
}

// prepare is extract without the extraction.
func prepare(t *testing.T, s *Snapshotter, n int, parallel bool) *extraction {
	t.Helper()
	e := &extraction{s: s, key: "extract-1-abcd " + chainID(n), name: chainID(n), labels: snapshots.WithLabels(map[string]string{layout.LabelTarget: chainID(n)})}
	parent := ""
	if n > 1 {
		parent = chainID(n - 1)
		e.labels = snapshots.WithLabels(map[string]string{layout.LabelTarget: chainID(n), layout.LabelParentChainID: parent})
	}
	if parallel {
		e.parent, parent = parent, ""
	}
	mounts, err := s.Prepare(t.Context(), e.key, parent, e.labels)
	fatal(t, err)
	e.mounts, e.upper = mounts, treetest.UpperDir(mounts)
	return e
}

// strategy is how a committed layer was made durable. It is compared with its seal, too.
func (e *extraction) strategy(t *testing.T) storage.Strategy {
	t.Helper()
	for _, c := range journalOf(t, e.s).Committed {
		if c.Name != e.name {
			continue
		}
		r, err := verify.Layer(t.Context(), e.s.cfg.Root, c, verify.Options{})
		if err != nil || r.State != storage.StateReady {
			t.Errorf("%+v, %v", r, err)
		}
		if _, err := os.Lstat(e.s.root.Applied(c.ID)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", e.s.root.Applied(c.ID), err)
		}
		return c.Strategy
	}
	t.Fatalf("%s is not in the journal", e.name)
	return ""
}

func (e *extraction) wantStrategy(t *testing.T, want storage.Strategy) {
	t.Helper()
	if got := e.strategy(t); got != want {
		t.Errorf("strategy %q, want %q", got, want)
	}
}

// TestApplyMeansTheSame: what a layer means does not depend on who has extracted it.
func TestApplyMeansTheSame(t *testing.T) {
	throughApply = true
	defer func() { throughApply = false }()
	for name, test := range map[string]func(*testing.T){
		"Inherit": TestInherit, "OpaqueRoot": TestOpaqueRoot, "InheritedInside": TestInheritedInside, "RootOwner": TestRootOwner,
	} {
		t.Run(name, test)
	}
}

// TestApply: Commit does not sync the file system after an Apply, unless only the parent
// can tell what the layer means.
func TestApply(t *testing.T) {
	throughApply = true
	defer func() { throughApply = false }()
	plain := []tar.Header{dir("a", 0o755, 0), file("a/file"), file(".wh.gone"), dir("b", 0o700, 5), opaque("b")}
	for _, c := range []struct {
		what     string
		parallel bool
		layer    []tar.Header
		want     storage.Strategy
	}{
		{"sequential", false, plain, storage.StrategyApplied},
		{"sequential invented", false, []tar.Header{file("a/file")}, storage.StrategyApplied},
		{"sequential opaque root", false, []tar.Header{opaque(".")}, storage.StrategyApplied},
		{"parallel", true, plain, storage.StrategyApplied},
		{"parallel invented", true, []tar.Header{file("a/file")}, storage.StrategySyncfs},
		{"parallel opaque root", true, []tar.Header{opaque(".")}, storage.StrategySyncfs},
	} {
		t.Run(c.what, func(t *testing.T) {
			s := start(t, t.TempDir())
			extract(t, s, 1, false, dir("a", 0o700, 7), file("gone"), dir("b", 0o700, 7), file("b/low")).mustCommit(t).wantStrategy(t, storage.StrategyApplied)
			e := extract(t, s, 2, c.parallel, c.layer...)
			if u, err := s.Usage(t.Context(), e.key); err != nil || u.Inodes < 1 {
				t.Errorf("usage before Commit: %+v, %v", u, err)
			}
			e.mustCommit(t).wantStrategy(t, c.want)
			r, err := layout.ReadRecord(filepath.Dir(e.upper))
			if err != nil || r.Kind != "committed" || r.Digest == "" {
				t.Errorf("record %+v, %v", r, err)
			}
			// The digests of the content are taken on the way, and nothing is read again for them.
			read, err := contents.Write(t.Context(), e.upper, filepath.Join(t.TempDir(), "read"), contents.Reading{})
			if err != nil || c.want == storage.StrategyApplied && r.Contents != read {
				t.Errorf("content digests %q, its files have %q, %v", r.Contents, read, err)
			}
		})
	}
}

// TestApplyWithUserXattr: marks that Apply has moved are not taken for some of the tar by
// a Commit that goes through the tree again.
func TestApplyWithUserXattr(t *testing.T) {
	root := t.TempDir()
	quiet(t)
	s, err := New(t.Context(), Config{Root: root, MountOptions: []string{"userxattr"}, NoBackground: true})
	fatal(t, err)
	defer stop(t, s)
	throughApply = true
	defer func() { throughApply = false }()
	for _, shown := range []bool{false, true} {
		n := map[bool]int{false: 1, true: 3}[shown]
		extract(t, s, n, false, dir("b", 0o755, 0), file("b/low")).mustCommit(t)
		e := extract(t, s, n+1, false, dir("b", 0o755, 0), opaque("b"))
		want := storage.StrategyApplied
		if shown {
			want = storage.StrategySyncfs
			if _, err := s.Mounts(t.Context(), e.key); err != nil {
				t.Fatal(err)
			}
		}
		e.mustCommit(t).wantStrategy(t, want)
		if got := xattrsOf(t, e.path("b")); got != "[{user.overlay.opaque y}]" {
			t.Errorf("shown %v: %s", shown, got)
		}
		if m := e.marks(t); m.Opaque != 1 {
			t.Errorf("shown %v: %+v", shown, m)
		}
	}
}

// TestAppliedThenWritten: nothing that was written after Apply is committed without a
// sync. Through mounts that were there before, it is refused for ever; through those of a
// later Mounts, it becomes part of the layer.
func TestAppliedThenWritten(t *testing.T) {
	s := start(t, t.TempDir())
	e := prepare(t, s, 1, false)
	fatal(t, e.apply(t, file("of the tar")))
	if names, err := namesIn(e.upper); err != nil || len(names) != 0 {
		t.Fatalf("%q, %v", names, err)
	}
	fatal(t, os.WriteFile(e.path("written"), nil, 0o600))
	for range 2 {
		if err := e.commit(t); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("commit: %v", err)
		}
		fatal(t, os.RemoveAll(e.path("written"))) // too late
	}
	fatal(t, s.Remove(t.Context(), e.key))

	e = prepare(t, s, 1, false)
	fatal(t, e.apply(t, file("of the tar")))
	mounts, err := s.Mounts(t.Context(), e.key)
	if err != nil || treetest.UpperDir(mounts) != e.upper {
		t.Fatalf("%v, %v", mounts, err)
	}
	fatal(t, os.WriteFile(e.path("written"), nil, 0o600))
	e.mustCommit(t).wantStrategy(t, storage.StrategySyncfs)
	if names, err := namesIn(e.upper); err != nil || len(names) != 2 {
		t.Errorf("%q, %v", names, err)
	}
}

// TestApplyFails: after an Apply that has failed, the snapshot can be removed and nothing
// else. One that runs is ended by Remove, and keeps Commit out.
func TestApplyFails(t *testing.T) {
	s := start(t, t.TempDir())
	e := prepare(t, s, 1, false)
	broken := errors.New("broken")
	if err := s.Apply(t.Context(), e.mounts, func(_ context.Context, root string, _ applier.Whiteouts, _ *fsync.Files) (*unpack.Extracted, error) {
		return nil, errors.Join(broken, os.WriteFile(filepath.Join(root, "part"), nil, 0o600))
	}); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	if err := e.commit(t); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("commit: %v", err)
	}
	if err := e.apply(t); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("apply again: %v", err)
	}
	fatal(t, s.Remove(t.Context(), e.key))

	e = prepare(t, s, 1, false)
	started, ended := make(chan struct{}), make(chan error)
	go func() {
		ended <- s.Apply(context.WithoutCancel(t.Context()), e.mounts, func(ctx context.Context, _ string, _ applier.Whiteouts, _ *fsync.Files) (*unpack.Extracted, error) {
			close(started)
			<-ctx.Done()
			return nil, ctx.Err()
		})
	}()
	<-started
	if err := e.commit(t); !errdefs.IsUnavailable(err) {
		t.Errorf("commit during Apply: %v", err)
	}
	if err := e.apply(t); !errdefs.IsUnavailable(err) {
		t.Errorf("a second Apply: %v", err)
	}
	if _, err := s.Mounts(t.Context(), e.key); err != nil {
		t.Errorf("mounts during Apply: %v", err)
	}
	fatal(t, s.Remove(t.Context(), e.key))
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the Apply of a removed snapshot: %v", err)
	}
	fatal(t, s.Cleanup(t.Context()))
	if entries, err := os.ReadDir(s.root.Snapshots()); err != nil || len(entries) != 0 {
		t.Errorf("%v, %v", entries, err)
	}

	// What panics ends, too.
	e = prepare(t, s, 1, false)
	func() {
		defer func() { _ = recover() }()
		_ = s.Apply(t.Context(), e.mounts, func(context.Context, string, applier.Whiteouts, *fsync.Files) (*unpack.Extracted, error) {
			panic("tar")
		})
	}()
	if err := e.commit(t); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("commit after a panic: %v", err)
	}
	fatal(t, s.Remove(t.Context(), e.key))

	// A write that fails after Apply, whoever meets the error, may be of its layer.
	e = prepare(t, s, 1, false)
	fatal(t, e.apply(t, file("file")))
	_ = s.gate.Do(t.Context(), func() error { return &fsync.Error{Op: "fsync", Path: "elsewhere", Err: unix.EIO} })
	if err := e.commit(t); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("commit after a failed write: %v", err)
	}
}

// TestApplyAgain: a layer is applied once.
func TestApplyAgain(t *testing.T) {
	s := start(t, t.TempDir())
	e := prepare(t, s, 1, false)
	fatal(t, e.apply(t, file("file")))
	if err := e.apply(t, file("other")); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	e.mustCommit(t).wantStrategy(t, storage.StrategyApplied)
}

// TestNotOurs: Apply leaves alone what it cannot prove to be a layer in the making.
func TestNotOurs(t *testing.T) {
	s := start(t, t.TempDir())
	extract(t, s, 1, false, file("file")).mustCommit(t)
	view, err := s.View(t.Context(), "view", chainID(1))
	fatal(t, err)
	container, err := s.Prepare(t.Context(), "container", chainID(1))
	fatal(t, err)
	e := prepare(t, s, 2, false)
	other := append([]mount.Mount{}, e.mounts...)
	other[0].Options = append([]string{"uidmap=0:100000:65536"}, other[0].Options...)
	begun := prepare(t, s, 3, true)
	fatal(t, os.WriteFile(begun.path("file"), nil, 0o600))
	for what, mounts := range map[string][]mount.Mount{
		"none": nil, "two": append(e.mounts, e.mounts...), "view": view, "container": container, "other options": other,
		"foreign": {{Type: "bind", Source: t.TempDir(), Options: []string{"rw"}}}, "begun": begun.mounts,
		"parent": {{Type: "bind", Source: s.root.Tree(1), Options: []string{"rw", "rbind"}}},
	} {
		if err := s.Apply(t.Context(), mounts, func(context.Context, string, applier.Whiteouts, *fsync.Files) (*unpack.Extracted, error) {
			t.Errorf("%s: something is extracted", what)
			return nil, nil
		}); !errors.Is(err, ErrNotOurs) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := begun.commit(t); err == nil {
		t.Error("committed on a parent that is not there")
	}
}

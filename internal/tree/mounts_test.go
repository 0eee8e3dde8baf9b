package tree_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/contents"
	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
)

// over mounts something until the test ends, or done is called.
func over(t testing.TB, source, target, kind string, flags uintptr) (done func()) {
	t.Helper()
	treetest.Check(t, unix.Mount(source, target, kind, flags, ""))
	mounted := true
	done = func() {
		if mounted {
			mounted = false
			treetest.Check(t, unix.Unmount(target, unix.MNT_DETACH))
		}
	}
	t.Cleanup(done)
	return done
}

// TestMounts: nothing that is mounted in a layer is walked into, changed, sealed or
// taken for damage, and the layer is whole when it is unmounted.
func TestMounts(t *testing.T) {
	snapshot := filepath.Dir(everyKindAt(t))
	root := snapshot + "/fs"
	path, digest := snapshot+"/seal", ""
	s, err := seal.Write(t.Context(), root, path)
	treetest.Check(t, err)
	digest = s.Digest
	list := snapshot + "/contents"
	contentsDigest, err := contents.Write(t.Context(), root, list, contents.Reading{})
	treetest.Check(t, err)
	layer := treetest.Tar(t, root)
	other := treetest.EveryKind(t)
	for name, mount := range map[string]struct {
		at  string
		do  func(t testing.TB, at string) func()
		not []string // calls that see nothing of it
	}{
		"tmpfs on a directory":  {"dir/sub", func(t testing.TB, at string) func() { return over(t, "none", at, "tmpfs", 0) }, nil},
		"bind on a directory":   {"dir/sub", func(t testing.TB, at string) func() { return over(t, other+"/many", at, "", unix.MS_BIND) }, nil},
		"bind of itself":        {"dir/sub", func(t testing.TB, at string) func() { return over(t, at, at, "", unix.MS_BIND) }, nil},
		"bind on a file":        {"dir/file", func(t testing.TB, at string) func() { return over(t, other+"/dir/file", at, "", unix.MS_BIND) }, nil},
		"tmpfs on the root":     {"", func(t testing.TB, at string) func() { return over(t, "none", at, "tmpfs", 0) }, nil},
		"bind on the root":      {"", func(t testing.TB, at string) func() { return over(t, other, at, "", unix.MS_BIND) }, nil},
		"on an empty directory": {"empty", func(t testing.TB, at string) func() { return over(t, "none", at, "tmpfs", 0) }, []string{"VerifyContents", "VerifyTar"}},
		"tmpfs on the snapshot": {"..", func(t testing.TB, at string) func() { return over(t, "none", at, "tmpfs", 0) }, nil},
	} {
		for _, reports := range []bool{true, false} {
			if !reports && mount.at == ".." {
				continue // the mount is not on the tree itself
			}
			t.Run(name, func(t *testing.T) {
				tree.SetReportsMounts(reports)
				defer func() { tree.SetReportsMounts(true) }()
				at := filepath.Join(root, mount.at)
				done := mount.do(t, at)
				verify := func(found []finding.Finding, err error) error {
					if len(found) > 0 {
						t.Errorf("found %v", found)
					}
					return err
				}
				calls := map[string]func() error{
					"Write": func() error {
						_, err := seal.Write(t.Context(), root, t.TempDir()+"/seal")
						return err
					},
					"Verify": func() error { return verify(seal.Verify(t.Context(), root, path, digest, 5)) },
					"WriteContents": func() error {
						_, err := contents.Write(t.Context(), root, t.TempDir()+"/contents", contents.Reading{})
						return err
					},
					"VerifyContents": func() error {
						return verify(contents.Verify(t.Context(), root, list, contentsDigest, 5, contents.Reading{}))
					},
					"VerifyTar": func() error {
						_, err := layer.Seek(0, 0)
						treetest.Check(t, err)
						return verify(contents.VerifyTar(t.Context(), root, layer, 5, contents.Reading{}))
					},
				}
				for call, fn := range calls {
					err := fn()
					if slices.Contains(mount.not, call) {
						continue
					}
					if !errors.Is(err, tree.ErrMounted) || errors.Is(err, mtree.ErrUnsealed) || !strings.Contains(err.Error(), at+" ") {
						t.Errorf("%s: error %v", call, err)
					}
				}
				done()
				for call, fn := range calls {
					if err := fn(); err != nil {
						t.Errorf("%s when it is unmounted: %v", call, err)
					}
				}
			})
		}
	}
}

// everyKindAt is everyKind where a snapshot has it.
func everyKindAt(t testing.TB) (root string) {
	t.Helper()
	root = filepath.Join(t.TempDir(), "1", "fs")
	treetest.Check(t, os.Mkdir(filepath.Dir(root), 0o700))
	treetest.Check(t, os.Rename(treetest.EveryKind(t), root))
	return root
}

// TestSubvolume: a subvolume of btrfs has another device number and is no mount.
func TestSubvolume(t *testing.T) {
	root := treetest.Formatted(t, "btrfs", 256<<20) + "/fs"
	treetest.Check(t, os.Mkdir(root, 0o755))
	treetest.Run(t, "btrfs", "-q", "subvolume", "create", root+"/sub")
	treetest.Check(t, os.WriteFile(root+"/sub/file", []byte("content"), 0o644))
	for _, reports := range []bool{true, false} {
		tree.SetReportsMounts(reports)
		path := t.TempDir() + "/seal"
		s, err := seal.Write(t.Context(), root, path)
		treetest.Check(t, err)
		found, err := seal.Verify(t.Context(), root, path, s.Digest, 5)
		if err != nil || len(found) > 0 || !strings.Contains(treetest.Text(t, path), "./sub/file ") {
			t.Errorf("found %v, error %v", found, err)
		}
		_, err = contents.Write(t.Context(), root, path+".contents", contents.Reading{})
		treetest.Check(t, err)
	}
	tree.SetReportsMounts(true)
}

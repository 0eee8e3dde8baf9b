package seal

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/contents"
	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
)

// TestErrorsOfOurs: that a seal or a tree cannot be accessed is no evidence about
// them.
func TestErrorsOfOurs(t *testing.T) {
	root := withContent(t)
	path, s := sealOf(t, root)
	list, digest := contentsOf(t, root)
	layer := tarOf(t, root)
	calls := map[string]func() ([]finding.Finding, error){
		"Verify": func() ([]finding.Finding, error) { return Verify(t.Context(), root, path, s.Digest, 5) },
		"VerifyContents": func() ([]finding.Finding, error) {
			return contents.Verify(t.Context(), root, list, digest, 5, contents.Reading{})
		},
		"VerifyTar": func() ([]finding.Finding, error) {
			_, err := layer.Seek(0, 0)
			check(t, err)
			return contents.VerifyTar(t.Context(), root, layer, 5, contents.Reading{})
		},
		"TextDigest": func() ([]finding.Finding, error) { _, err := mtree.TextDigest(path); return nil, err },
	}
	for name, call := range calls {
		var found []finding.Finding
		var err error
		withoutDescriptors(t, func() { found, err = call() })
		if !errors.Is(err, unix.EMFILE) || errors.Is(err, mtree.ErrUnsealed) || tree.Unreadable(err) || len(found) > 0 {
			t.Errorf("%s without descriptors: found %v, error %v", name, found, err)
		}
		if found, err := call(); err != nil || len(found) > 0 {
			t.Errorf("%s with descriptors: found %v, error %v", name, found, err)
		}
	}
	t.Run("loop", func(t *testing.T) {
		loop := t.TempDir() + "/seal"
		check(t, os.Symlink("seal", loop))
		if _, err := Verify(t.Context(), root, loop, s.Digest, 5); !errors.Is(err, unix.ELOOP) || errors.Is(err, mtree.ErrUnsealed) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("not a file", func(t *testing.T) {
		dir := t.TempDir()
		check(t, unix.Mkfifo(dir+"/fifo", 0o600))
		for _, path := range []string{dir, dir + "/fifo", dir + "/none", path + "/below"} {
			if _, err := Verify(t.Context(), root, path, s.Digest, 5); !errors.Is(err, mtree.ErrUnsealed) {
				t.Errorf("%s: error %v", path, err)
			}
		}
	})
	t.Run("name in the way", func(t *testing.T) {
		// A path that is too long for lstat(2) is not a path that is missing.
		long := root + strings.Repeat("/x", unix.PathMax/2)
		if found, err := Verify(t.Context(), long, path, s.Digest, 5); err == nil || len(found) > 0 {
			t.Errorf("found %v, error %v", found, err)
		}
	})
}

// TestUnreadableSeal: a medium that does not give a seal back is evidence, unless
// it gives nothing back, as an xfs does that has shut itself down.
func TestUnreadableSeal(t *testing.T) {
	mnt := formatted(t, "xfs", 512<<20)
	root := mnt + "/1/fs"
	check(t, os.MkdirAll(root, 0o755))
	check(t, os.WriteFile(root+"/file", []byte("content"), 0o644))
	s, err := Write(t.Context(), root, mnt+"/1/seal")
	check(t, err)
	digest, err := contents.Write(t.Context(), root, mnt+"/1/contents", contents.Reading{})
	check(t, err)
	outside, o := sealOf(t, root)
	unix.Sync()
	f, err := os.Open(mnt)
	check(t, err)
	const goingDown = 0x8004587d // XFS_IOC_GOINGDOWN, xfs_fs.h
	check(t, unix.IoctlSetPointerInt(int(f.Fd()), goingDown, 2))
	check(t, f.Close())
	for name, call := range map[string]func() ([]finding.Finding, error){
		"seal": func() ([]finding.Finding, error) { return Verify(t.Context(), root, mnt+"/1/seal", s.Digest, 5) },
		"tree": func() ([]finding.Finding, error) { return Verify(t.Context(), root, outside, o.Digest, 5) },
		"list": func() ([]finding.Finding, error) {
			return contents.Verify(t.Context(), root, mnt+"/1/contents", digest, 5, contents.Reading{})
		},
	} {
		if found, err := call(); err == nil || errors.Is(err, mtree.ErrUnsealed) || len(found) > 0 {
			t.Errorf("%s on an xfs that has shut itself down: found %v, error %v", name, found, err)
		}
	}
}

// TestTextDigest: the digests of a seal and of a list of contents are those of their text.
func TestTextDigest(t *testing.T) {
	root := withContent(t)
	path, s := sealOf(t, root)
	if got, err := mtree.TextDigest(path); err != nil || got != s.Digest {
		t.Errorf("%s, %v, want %s", got, err, s.Digest)
	}
	list, digest := contentsOf(t, root)
	if got, err := mtree.TextDigest(list); err != nil || got != digest {
		t.Errorf("%s, %v, want %s", got, err, digest)
	}
}

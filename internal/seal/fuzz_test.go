package seal

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
)

// FuzzSeal: whatever lines a seal with the right digest has, a verification ends with
// findings, or takes the seal for none; and what it finds nothing wrong with has as many
// entries as the seal has lines. The same text as the seal of a layer below ends, too.
func FuzzSeal(f *testing.F) {
	root, own := f.TempDir(), f.TempDir()
	for _, dir := range []string{root, own} {
		check(f, os.MkdirAll(filepath.Join(dir, "dir/sub"), 0o755))
	}
	check(f, os.WriteFile(root+"/dir/file", []byte("content"), 0o644))
	check(f, os.Symlink("file", root+"/dir/soft"))
	check(f, overlayutil.User.Set(root+"/dir/sub", overlayutil.AttrOpaque, overlayutil.Opaque))
	still(f, root)
	path, _ := sealOf(f, root)
	good := text(f, path)
	entries := strings.Count(good, "\n") - 1
	f.Add(good)
	f.Add(strings.ReplaceAll(good, "xattr.", "xattrdigest."))
	f.Add(strings.ReplaceAll(good, "type=dir", "type=link link=\\056 nlink=3"))
	earlier, _ := sealBefore(f, root)
	f.Add(text(f, earlier))
	f.Fuzz(func(t *testing.T, lines string) {
		path, digest := packText(t, lines)
		defer os.RemoveAll(filepath.Dir(path))
		found, err := Verify(t.Context(), root, path, digest, 10)
		switch {
		case err != nil && !errors.Is(err, mtree.ErrUnsealed):
			t.Errorf("error %v", err)
		case lines == good && (err != nil || len(found) > 0):
			t.Errorf("the seal of the tree: %v, %v", found, err)
		case err == nil && len(found) == 0 && strings.Count(lines, "\n")-1 != entries:
			t.Errorf("a seal of %d lines is that of %d entries", strings.Count(lines, "\n")-1, entries)
		}
		for _, space := range []overlayutil.Space{overlayutil.Trusted, overlayutil.User} {
			d, err := ListDirs(t.Context(), own, space, func(*Entry) bool { return true })
			check(t, err)
			if err := d.Below(root, path, digest); err == nil {
				for _, rel := range []string{"dir", "dir/sub", "none"} {
					if _, _, err := d.Shown(rel); err != nil && !errors.Is(err, mtree.ErrUnsealed) && !errors.As(err, new(*LostError)) {
						t.Errorf("shown: %v", err)
					}
				}
				_, err = d.Compare(path, digest, 10, func(string) (bool, error) { return true, nil })
				unsealed(t, err)
			} else {
				unsealed(t, err)
			}
			_, err = SealedDirs(path, digest, space)
			unsealed(t, err)
			_, err = SealedTop(path, digest, space)
			unsealed(t, err)
		}
	})
}

func unsealed(t *testing.T, err error) {
	t.Helper()
	if err != nil && !errors.Is(err, mtree.ErrUnsealed) {
		t.Errorf("error %v", err)
	}
}

package marks

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
)

// TestNormalize: what becomes of the marks of one directory, in which space the
// mounts read them, and whether an applier wrote them.
func TestNormalize(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("trusted attributes need root")
	}
	quiet(t)
	const opaque, smuggled, redirect = "trusted.overlay.opaque", "user.overlay.opaque", "trusted.overlay.redirect"
	for name, c := range map[string]struct {
		space        overlayutil.Space
		direct       bool
		set          string // the mark, of value "y"
		want         string // the mark that is left, "" for none
		found        layout.OverlayMarks
		refused      bool
		unrepeatable bool
	}{
		"in its space":        {overlayutil.Trusted, true, opaque, opaque, layout.OverlayMarks{Opaque: 1}, false, false},
		"moved":               {overlayutil.User, true, opaque, smuggled, layout.OverlayMarks{Opaque: 1, Moved: 1}, false, true},
		"of the tar":          {overlayutil.User, true, smuggled, "", layout.OverlayMarks{Removed: 1}, false, true},
		"of the other space":  {overlayutil.Trusted, true, smuggled, "", layout.OverlayMarks{Removed: 1}, false, true},
		"through a mount":     {overlayutil.Trusted, false, smuggled, smuggled, layout.OverlayMarks{}, false, false},
		"redirect":            {overlayutil.Trusted, true, redirect, redirect, layout.OverlayMarks{}, true, false},
		"redirect by a mount": {overlayutil.Trusted, false, redirect, redirect, layout.OverlayMarks{}, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			tree := t.TempDir()
			path := filepath.Join(tree, "dir")
			if err := errors.Join(os.Mkdir(path, 0o700), unix.Lsetxattr(path, c.set, []byte("y"), 0)); err != nil {
				t.Fatal(err)
			}
			e, err := seal.Read(path, "dir")
			if err != nil {
				t.Fatal(err)
			}
			n := New(Options{Space: c.space, Direct: c.direct, Tree: tree})
			changed, err := n.Normalize(t.Context(), path, &e)
			if meaning := (*Error)(nil); c.refused != errors.As(err, &meaning) || c.refused != errdefs.IsFailedPrecondition(err) || !c.refused && err != nil {
				t.Errorf("refused %v: %v", c.refused, err)
			}
			if changed != c.unrepeatable || n.Unrepeatable() != c.unrepeatable {
				t.Errorf("changed %v, unrepeatable %v, want %v", changed, n.Unrepeatable(), c.unrepeatable)
			}
			c.found.Space = string(c.space)
			if got := n.Found(); got != c.found {
				t.Errorf("found %+v, want %+v", got, c.found)
			}
			for _, mark := range []string{opaque, smuggled, redirect} {
				size, err := unix.Lgetxattr(path, mark, nil)
				if has := err == nil && size > 0; has != (mark == c.want) {
					t.Errorf("%s is there: %v, %v", mark, has, err)
				}
			}
		})
	}
}

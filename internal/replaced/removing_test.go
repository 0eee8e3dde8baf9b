package replaced

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
)

func fatal(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func names(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	fatal(t, err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// TestRemoveMountedMeanwhile: a mount appears in a tree that already is in removing/.
func TestRemoveMountedMeanwhile(t *testing.T) {
	root := layout.Root{Path: t.TempDir()}
	warnings := map[string]log.Fields{}
	trees := New(root, nil, "boot", func(_ context.Context, key string, fields log.Fields, _ string) { warnings[key] = fields })
	point := filepath.Join(root.Removing(), "17.x", "fs", "mnt")
	fatal(t, os.MkdirAll(point, 0o755))
	fatal(t, os.WriteFile(filepath.Join(root.Removing(), "17.x", "fs", "file"), nil, 0o600))
	host := t.TempDir()
	fatal(t, os.WriteFile(filepath.Join(host, "precious"), nil, 0o600))
	fatal(t, unix.Mount(host, point, "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(point, unix.MNT_DETACH) })
	trees.Delete(t.Context())
	trees.Delete(t.Context())
	if got := names(t, host); len(got) != 1 {
		t.Errorf("deleted through the mount: %v", got)
	}
	if got := names(t, filepath.Join(root.Removing(), "17.x", "fs")); fmt.Sprint(got) != "[mnt]" {
		t.Errorf("left %v, want the mount point", got)
	}
	if len(warnings) != 1 || warnings["undeleted "+filepath.Join(root.Removing(), "17.x")]["cure"] == nil {
		t.Errorf("want one warning with the cure: %v", warnings)
	}
	fatal(t, unix.Unmount(point, 0))
	trees.Delete(t.Context())
	if got := names(t, root.Removing()); len(got) > 0 {
		t.Errorf("left %v", got)
	}
}

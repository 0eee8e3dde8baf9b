package replaced

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
)

// Delete deletes what lies in removing/, tree by tree, until ctx ends. What cannot be
// deleted stays for the next call, with a warning.
func (t *Trees) Delete(ctx context.Context) {
	t.deleting.Lock()
	defer t.deleting.Unlock()
	for _, area := range t.root.Areas() {
		dir := filepath.Join(area, layout.RemovingDir)
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.warnOnce(ctx, "unread "+dir, log.Fields{"path": dir, "error": err}, "directories of removed snapshots were not deleted")
		}
		for _, e := range entries {
			if ctx.Err() != nil {
				return
			}
			t.deleteTree(ctx, filepath.Join(dir, e.Name()))
			faults.Point(faults.SweepDeleted)
		}
	}
}

// deleteTree deletes a tree that nothing uses, without crossing a mount.
func (t *Trees) deleteTree(ctx context.Context, path string) {
	err := tree.Remove(ctx, path)
	if err == nil || ctx.Err() != nil {
		return
	}
	fields := log.Fields{"path": path, "error": err}
	if left := (*tree.LeftError)(nil); errors.As(err, &left) && len(left.Mounts) > 0 {
		fields["cure"] = "unmount what is mounted there"
	}
	t.warnOnce(ctx, "undeleted "+path, fields, "the tree of a removed snapshot was not deleted completely: another Cleanup tries again")
}

// Discard deletes a tree in healing/ that was never in use. What is left of it when
// ctx ends is deleted by the next Delete.
func (t *Trees) Discard(ctx context.Context, path string) {
	aside := filepath.Join(t.root.Removing(), fmt.Sprintf("%s.%s", filepath.Base(path), layout.NewRunID()))
	if err := os.Rename(path, aside); err == nil {
		path = aside
	}
	t.deleteTree(ctx, path)
}

// treesIn returns the names in one of the directories beside snapshots/.
func (t *Trees) treesIn(ctx context.Context, dir string) (names []string) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.warnOnce(ctx, "unread "+dir, log.Fields{"path": dir, "error": err}, "a directory cannot be read: what it holds stays")
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// moveToRemoving moves a tree that lies in healing/ or replaced/.
func (t *Trees) moveToRemoving(dir string) error {
	kind, area := filepath.Base(filepath.Dir(dir)), filepath.Dir(filepath.Dir(dir))
	return os.Rename(dir, filepath.Join(area, layout.RemovingDir, fmt.Sprintf("%s-%s.%s", kind, filepath.Base(dir), layout.NewRunID())))
}

// warnStuck warns that a tree could not be moved; it does nothing without an error.
func (t *Trees) warnStuck(ctx context.Context, dir string, err error) {
	if err != nil {
		t.warnOnce(ctx, "stuck "+dir, log.Fields{"path": dir, "error": err, "cure": "delete it by hand"}, "a tree that was replaced cannot be moved: it is left in place")
	}
}

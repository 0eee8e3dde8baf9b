package rebuild

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

func fatal(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// add makes a snapshot directory with a record, and with a seal if it is committed.
func add(t *testing.T, root layout.Root, id uint64, kind snapshots.Kind, name, parent string) {
	t.Helper()
	fatal(t, os.MkdirAll(root.Tree(id), 0o755))
	fatal(t, os.WriteFile(filepath.Join(root.Tree(id), "file"), []byte(name), 0o644))
	r := layout.RecordOf(id, snapshots.Info{Kind: kind, Name: name, Parent: parent})
	if kind == snapshots.KindCommitted {
		sum, err := seal.Write(t.Context(), root.Tree(id), filepath.Join(root.Dir(id), layout.SealFile))
		fatal(t, err)
		r.Digest, r.Entries = sum.Digest, sum.Entries
	}
	fatal(t, layout.WriteRecord(root.Dir(id), r))
}

// TestDatabase: what is restored, what is set aside and why, and that nothing is
// rebuilt twice.
func TestDatabase(t *testing.T) {
	root := layout.Root{Path: t.TempDir()}
	add(t, root, 1, snapshots.KindCommitted, "base", "")
	add(t, root, 2, snapshots.KindCommitted, "damaged", "base")
	fatal(t, os.Remove(filepath.Join(root.Tree(2), "file")))
	add(t, root, 3, snapshots.KindActive, "on damaged", "damaged")
	add(t, root, 4, snapshots.KindActive, "container", "base")
	add(t, root, 5, snapshots.KindView, "view", "base")
	fatal(t, os.MkdirAll(root.Tree(6), 0o755))
	add(t, root, 8, snapshots.KindActive, "copied", "")
	fatal(t, os.Rename(root.Dir(8), root.Dir(7)))

	r, err := Database(t.Context(), root.Path)
	fatal(t, err)
	if r.Committed != 1 || r.Active != 1 || r.Views != 1 || r.OldFile != "" {
		t.Errorf("%+v", r)
	}
	want := map[string]string{
		"2": "not whole: ", "3": `its parent "damaged" was not restored`,
		"6": "no usable record: ", "7": "its record belongs to directory 8",
	}
	for _, aside := range r.SetAside {
		id, _, _ := strings.Cut(filepath.Base(aside.Directory), ".")
		if want[id] == "" || !strings.HasPrefix(aside.Reason, want[id]) {
			t.Errorf("directory %s: %+v, want %q", id, aside, want[id])
		}
		delete(want, id)
		if _, err := os.Stat(filepath.Join(aside.Directory, "fs")); err != nil {
			t.Error(err)
		}
	}
	if len(want) > 0 {
		t.Errorf("not set aside: %v", want)
	}
	rows := map[string]uint64{}
	fatal(t, storage.ReadOnly(t.Context(), root.Path, func(ctx context.Context, j *storage.Journal) error {
		if e, err := j.GetCommitted(1); err != nil || e.Strategy != storage.StrategyRebuilt {
			t.Errorf("%+v, %v", e, err)
		}
		return storage.Walk(ctx, func(id uint64, info snapshots.Info, _ snapshots.Usage) error {
			rows[info.Name] = id
			return nil
		})
	}))
	if len(rows) != 3 || rows["base"] != 1 || rows["container"] != 4 || rows["view"] != 5 {
		t.Errorf("rows %v", rows)
	}
	if _, err := Database(t.Context(), root.Path); !errors.Is(err, ErrIntact) {
		t.Errorf("a second time: %v", err)
	}
}

// TestResolve: of two directories with one name the newer one is restored, parents
// stand before children, and parents that form a cycle are not restored.
func TestResolve(t *testing.T) {
	record := func(kind, name, parent string) layout.Record {
		return layout.Record{Kind: kind, Name: name, Parent: parent}
	}
	b := builder{all: []*candidate{ // the newest first, as read sorts them
		{dirID: 9, record: record("active", "container", "top")},
		{dirID: 8, record: record("committed", "one", "two")},
		{dirID: 7, record: record("committed", "two", "one")},
		{dirID: 6, record: record("committed", "top", "base")},
		{dirID: 5, record: record("committed", "base", "")},
		{dirID: 4, record: record("committed", "base", "")},
	}}
	b.resolve()
	var order, refused []uint64
	for _, c := range b.order {
		order = append(order, c.dirID)
	}
	for _, c := range b.all {
		if c.reason != "" {
			refused = append(refused, c.dirID)
		}
	}
	if !slices.Equal(order, []uint64{5, 6, 9}) || !slices.Equal(refused, []uint64{8, 7, 4}) {
		t.Errorf("restored %v, not restored %v", order, refused)
	}
}

// TestForeignNames: a directory that another program has made beside those of snapshots
// is not taken for one of them, whose healthy layer would be set aside in its place.
func TestForeignNames(t *testing.T) {
	root := layout.Root{Path: t.TempDir()}
	add(t, root, 7, snapshots.KindCommitted, "base", "")
	fatal(t, os.MkdirAll(filepath.Join(root.Snapshots(), "007"), 0o755))
	r, err := Database(t.Context(), root.Path)
	fatal(t, err)
	if r.Committed != 1 || len(r.SetAside) > 0 {
		t.Errorf("%+v", r)
	}
	fatal(t, errors.Join(exists(root.Dir(7)), exists(filepath.Join(root.Snapshots(), "007"))))
}

func exists(path string) error {
	_, err := os.Lstat(path)
	return err
}

// TestParentMustBeCommitted: a snapshot whose record names an active one as its parent
// is set aside, whichever of them is visited first, and the others are restored.
func TestParentMustBeCommitted(t *testing.T) {
	for _, parent := range []uint64{2, 4} {
		root := layout.Root{Path: t.TempDir()}
		add(t, root, 1, snapshots.KindCommitted, "base", "")
		add(t, root, parent, snapshots.KindActive, "container", "base")
		add(t, root, 3, snapshots.KindActive, "on container", "container")
		r, err := Database(t.Context(), root.Path)
		fatal(t, err)
		if r.Committed != 1 || r.Active != 1 || len(r.SetAside) != 1 || r.SetAside[0].Name != "on container" {
			t.Errorf("parent %d: %+v", parent, r)
		}
	}
}

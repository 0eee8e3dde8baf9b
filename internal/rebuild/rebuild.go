package rebuild

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// ErrIntact is returned by Database when there is nothing to rebuild.
var ErrIntact = errors.New("metadata.db is whole")

// Result counts the rows of the new database and lists what it does not have.
type Result struct {
	Committed int        `json:"committed"`
	Active    int        `json:"active"`
	Views     int        `json:"views"`
	OldFile   string     `json:"old_file,omitempty"` // where the damaged database lies now
	SetAside  []SetAside `json:"set_aside"`
}

// SetAside is a directory that the new database does not list.
type SetAside struct {
	Directory string `json:"directory"` // where it lies now
	Name      string `json:"name,omitempty"`
	Reason    string `json:"reason"`
}

// candidate is a snapshot directory with its record.
type candidate struct {
	dirID  uint64
	record layout.Record
	reason string // why it is not restored; empty when it is
}

// Database makes a new metadata.db from the records beside the layers, for a root
// whose database is missing or damaged and whose daemon is not running. A committed
// layer is restored when a walk finds exactly what its seal lists; the old database
// is kept, and a directory that cannot be restored is moved to set-aside/, children
// of a layer that is not whole included. Content is not read.
//
// The error is ErrIntact when the database can be read, and storage.ErrLocked when a
// daemon uses it. After any other error the rebuild can be run again.
func Database(ctx context.Context, root string) (_ Result, err error) {
	err = storage.ReadOnly(ctx, root, func(context.Context, *storage.Journal) error { return nil })
	switch {
	case err == nil:
		return Result{}, fmt.Errorf("rebuild %s: %w", root, ErrIntact)
	case !errors.Is(err, storage.ErrDamaged) && !errors.Is(err, os.ErrNotExist):
		return Result{}, fmt.Errorf("rebuild %s: %w", root, err)
	}
	boot, err := layout.BootID()
	if err != nil {
		return Result{}, err
	}
	b := builder{root: layout.Root{Path: root}, bootID: boot, runID: layout.NewRunID(), now: time.Now().UTC()}
	if err := b.read(ctx); err != nil {
		return Result{}, err
	}
	b.resolve()
	return b.write(ctx)
}

// builder is one rebuild.
type builder struct {
	root          layout.Root
	bootID, runID string
	now           time.Time
	all           []*candidate
	order         []*candidate // restored, parents first
}

// read collects the directories and checks each against its record.
func (b *builder) read(ctx context.Context) error {
	entries, err := os.ReadDir(b.root.Snapshots())
	if err != nil {
		return err
	}
	for _, e := range entries {
		id, ours := layout.DirectoryID(e.Name())
		if !ours {
			continue // new-*, of a Prepare that a crash cut short, and foreign names such as 007
		}
		c := &candidate{dirID: id}
		b.all = append(b.all, c)
		dir := filepath.Join(b.root.Snapshots(), e.Name())
		if c.record, err = layout.ReadRecord(dir); err != nil {
			c.reason = "no usable record: " + err.Error()
			continue
		}
		if c.reason, err = check(ctx, b.root, id, c.record); err != nil {
			return err
		}
		if c.reason == "" {
			if c.record, err = adoptContents(dir, c.record); err != nil {
				return err
			}
		}
	}
	// Newest first: when two directories claim one name, the older one had
	// been removed and not yet been deleted.
	slices.SortFunc(b.all, func(x, y *candidate) int { return int(int64(y.dirID) - int64(x.dirID)) })
	return nil
}

// check returns why a directory does not match its record, "" when it does.
func check(ctx context.Context, root layout.Root, id uint64, r layout.Record) (string, error) {
	if r.ID != id {
		return fmt.Sprintf("its record belongs to directory %d", r.ID), nil
	}
	if layout.CheckName("name", r.Name) != nil || layout.KindOf(r.Kind) == snapshots.KindUnknown {
		return fmt.Sprintf("its record makes no sense: %s %q", r.Kind, r.Name), nil
	}
	if r.Kind != layout.KindName(snapshots.KindCommitted) {
		return "", nil
	}
	_ = layout.PlaceAgain(root, id) // fails where it has its place, as nearly always: the seal is what counts
	dir := root.Dir(id)
	findings, err := seal.Verify(ctx, filepath.Join(dir, "fs"), filepath.Join(dir, layout.SealFile), r.Digest, 1)
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case err != nil:
		return "not known to be whole: " + err.Error(), nil
	case len(findings) > 0:
		return "not whole: " + findings[0].String(), nil
	}
	return "", nil
}

// adoptContents keeps the content digests that lie beside a layer: they were taken
// of what was committed, and nothing that is read later is better evidence. A
// record of an older version does not name them. Digests that are not those that
// the record names, or cannot be read, are left where they are and not used.
func adoptContents(dir string, r layout.Record) (layout.Record, error) {
	if layout.KindOf(r.Kind) != snapshots.KindCommitted {
		return r, nil
	}
	digest, err := mtree.TextDigest(filepath.Join(dir, layout.ContentsFile))
	switch {
	case err != nil || r.Contents != "" && r.Contents != digest:
		r.Contents = ""
		return r, nil
	case r.Contents == digest:
		return r, nil
	}
	r.Contents = digest
	return r, layout.ReplaceRecordSync(dir, r)
}

// resolve puts parents before children and drops what has no parent.
func (b *builder) resolve() {
	byName := map[string]*candidate{}
	for _, c := range b.all {
		if c.reason != "" {
			continue
		}
		if newer := byName[c.record.Name]; newer != nil {
			c.reason = fmt.Sprintf("directory %d has the same name and is newer", newer.dirID)
			continue
		}
		byName[c.record.Name] = c
	}
	state := map[*candidate]int{} // 1 in work, 2 done
	var place func(*candidate)
	place = func(c *candidate) {
		if state[c] != 0 || c.reason != "" {
			return
		}
		state[c] = 1
		if name := c.record.Parent; name != "" {
			p := byName[name]
			if p != nil && p.reason == "" && p.record.Kind == layout.KindName(snapshots.KindCommitted) {
				place(p)
			}
			if p == nil || p.reason != "" || state[p] != 2 || p.record.Kind != layout.KindName(snapshots.KindCommitted) {
				c.reason = fmt.Sprintf("its parent %q was not restored", name)
				return
			}
		}
		state[c] = 2
		b.order = append(b.order, c)
	}
	for _, c := range b.all {
		place(c)
	}
}

// write moves aside what is not restored, syncs, and installs the database. In
// this order: with a database in place, the next start deletes what that does not
// list.
func (b *builder) write(ctx context.Context) (r Result, err error) {
	r.SetAside = []SetAside{}
	for _, c := range b.all {
		if c.reason == "" {
			continue
		}
		aside := filepath.Join(b.root.SetAside(), fmt.Sprintf("%d.%s", c.dirID, b.runID))
		if err := fsync.MkdirAll(filepath.Dir(aside), 0o700); err != nil {
			return r, err
		}
		if err := os.Rename(b.root.Dir(c.dirID), aside); err != nil {
			return r, err
		}
		r.SetAside = append(r.SetAside, SetAside{Directory: aside, Name: c.record.Name, Reason: c.reason})
	}
	cursor, err := fsync.OpenCursor(b.root.Snapshots())
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, cursor.Close()) }()
	// Covers the moves, and layers whose own Commit may have been cut short.
	if err := cursor.Sync(); err != nil {
		return r, err
	}
	rows := make([]storage.Row, 0, len(b.order))
	for _, c := range b.order {
		rows = append(rows, b.row(c.record))
		switch layout.KindOf(c.record.Kind) {
		case snapshots.KindCommitted:
			r.Committed++
		case snapshots.KindActive:
			r.Active++
		case snapshots.KindView:
			r.Views++
		}
	}
	r.OldFile, err = storage.Rebuild(ctx, b.root.Path, b.now.Format("20060102T150405Z"), rows)
	return r, err
}

func (b *builder) row(r layout.Record) storage.Row {
	row := storage.Row{
		ID:    r.ID,
		Info:  snapshots.Info{Kind: layout.KindOf(r.Kind), Name: r.Name, Parent: r.Parent, Labels: r.Labels, Created: r.Created, Updated: r.Updated},
		Usage: snapshots.Usage{Inodes: r.Inodes, Size: r.Size},
	}
	switch row.Info.Kind {
	case snapshots.KindCommitted:
		namespace, _ := layout.SplitName(r.Name)
		row.Commit = storage.CommitEntry{
			ID: r.ID, Name: r.Name, Namespace: namespace, ChainID: layout.ChainIDOf(r.Name, r.Labels), Parent: r.Parent,
			DiffID: r.Labels[layout.LabelDiffID], Entries: r.Entries, Bytes: r.Bytes, Digest: r.Digest,
			Time: r.Created, Strategy: storage.StrategyRebuilt, BootID: b.bootID, RunID: b.runID,
		}
		if r.Contents != "" {
			row.State = storage.StateEntry{ID: r.ID, State: storage.StateUnverified, Contents: r.Contents, Tree: r.Digest}
		}
	case snapshots.KindActive:
		chainID, extraction := layout.ExtractionOf(r.Name, r.Labels)
		row.Open = storage.OpenEntry{
			ID: r.ID, Key: r.Name, Extraction: extraction, ChainID: chainID, Parent: r.Parent,
			Started: r.Created, BootID: b.bootID, RunID: b.runID,
		}
	}
	return row
}

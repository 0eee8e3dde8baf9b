package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// ErrIntact is returned by Rebuild when there is nothing to rebuild.
var ErrIntact = errors.New("metadata.db is whole")

// Rebuilt is what a rebuild found.
type Rebuilt struct {
	Committed int        `json:"committed"`
	Active    int        `json:"active"`
	Views     int        `json:"views"`
	OldFile   string     `json:"old_file,omitempty"` // where the damaged database lies now
	SetAside  []SetAside `json:"set_aside"`
}

// SetAside is a directory that the new database does not speak of.
type SetAside struct {
	Directory string `json:"directory"` // where it lies now
	Name      string `json:"name,omitempty"`
	Reason    string `json:"reason"`
}

// found is a snapshot directory and what it says of itself.
type found struct {
	dirID  uint64
	record record
	reason string // why it is not restored; empty when it is
}

// Rebuild makes a new metadata.db from the records beside the layers, for a
// root whose database is missing or damaged and whose daemon is not running. A
// committed layer is restored when a walk finds exactly what its seal says; the old database is kept, and a directory that cannot be
// restored is moved to set-aside/, children of a layer that is not whole
// included. Content is not read.
func Rebuild(ctx context.Context, root string) (_ Rebuilt, err error) {
	err = storage.ReadOnly(ctx, root, func(context.Context, *storage.Journal) error { return nil })
	switch {
	case err == nil:
		return Rebuilt{}, fmt.Errorf("rebuild %s: %w", root, ErrIntact)
	case !errors.Is(err, storage.ErrDamaged) && !isNotExist(err):
		return Rebuilt{}, fmt.Errorf("rebuild %s: %w", root, err)
	}
	boot, err := bootID()
	if err != nil {
		return Rebuilt{}, err
	}
	b := rebuild{root: root, dir: filepath.Join(root, "snapshots"), bootID: boot, runID: newRunID(), now: time.Now().UTC()}
	if err := b.read(ctx); err != nil {
		return Rebuilt{}, err
	}
	b.resolve()
	return b.write(ctx)
}

type rebuild struct {
	root, dir, bootID, runID string
	now                      time.Time
	all                      []*found
	order                    []*found // restored, parents first
}

// read collects the directories and checks each against its record.
func (b *rebuild) read(ctx context.Context) error {
	entries, err := os.ReadDir(b.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		id, err := strconv.ParseUint(e.Name(), 10, 64)
		if err != nil {
			continue // of a Prepare that a crash cut short
		}
		f := &found{dirID: id}
		b.all = append(b.all, f)
		dir := filepath.Join(b.dir, e.Name())
		if f.record, err = readRecord(dir); err != nil {
			f.reason = "no usable record: " + err.Error()
			continue
		}
		if f.reason, err = check(ctx, dir, id, f.record); err != nil {
			return err
		}
	}
	// Newest first: when two directories claim one name, the older one had
	// been removed and not yet been deleted.
	slices.SortFunc(b.all, func(x, y *found) int { return int(int64(y.dirID) - int64(x.dirID)) })
	return nil
}

// check returns why a directory is not what its record says.
func check(ctx context.Context, dir string, id uint64, r record) (string, error) {
	if r.ID != id {
		return fmt.Sprintf("its record belongs to directory %d", r.ID), nil
	}
	if checkName("name", r.Name) != nil || kindOf(r.Kind) == snapshots.KindUnknown {
		return fmt.Sprintf("its record makes no sense: %s %q", r.Kind, r.Name), nil
	}
	if r.Kind != kindNames[snapshots.KindCommitted] {
		return "", nil
	}
	findings, err := seal.Verify(ctx, filepath.Join(dir, "fs"), filepath.Join(dir, sealFile), r.Digest, 1)
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

// resolve puts parents before children and drops what has no parent.
func (b *rebuild) resolve() {
	byName := map[string]*found{}
	for _, f := range b.all {
		if f.reason != "" {
			continue
		}
		if newer := byName[f.record.Name]; newer != nil {
			f.reason = fmt.Sprintf("directory %d has the same name and is newer", newer.dirID)
			continue
		}
		byName[f.record.Name] = f
	}
	state := map[*found]int{} // 1 in work, 2 done
	var place func(*found)
	place = func(f *found) {
		if state[f] != 0 || f.reason != "" {
			return
		}
		state[f] = 1
		if name := f.record.Parent; name != "" {
			p := byName[name]
			switch {
			case p == nil, p.reason != "", p.record.Kind != kindNames[snapshots.KindCommitted]:
			default:
				place(p)
			}
			if p == nil || p.reason != "" || state[p] != 2 {
				f.reason = fmt.Sprintf("its parent %q was not restored", name)
				return
			}
		}
		state[f] = 2
		b.order = append(b.order, f)
	}
	for _, f := range b.all {
		place(f)
	}
}

// write moves aside what is not restored, syncs, and installs the database. In
// this order: with a database in place, the next start deletes what it does not
// speak of.
func (b *rebuild) write(ctx context.Context) (r Rebuilt, err error) {
	r.SetAside = []SetAside{}
	for _, f := range b.all {
		if f.reason == "" {
			continue
		}
		aside := filepath.Join(b.root, "set-aside", fmt.Sprintf("%d.%s", f.dirID, b.runID))
		if err := fsync.MkdirAll(filepath.Dir(aside), 0o700); err != nil {
			return r, err
		}
		if err := os.Rename(filepath.Join(b.dir, strconv.FormatUint(f.dirID, 10)), aside); err != nil {
			return r, err
		}
		r.SetAside = append(r.SetAside, SetAside{Directory: aside, Name: f.record.Name, Reason: f.reason})
	}
	cursor, err := fsync.OpenCursor(b.dir)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, cursor.Close()) }()
	// Covers the moves, and layers whose own Commit may have been cut short.
	if err := cursor.Sync(); err != nil {
		return r, err
	}
	rows := make([]storage.Row, 0, len(b.order))
	for _, f := range b.order {
		rows = append(rows, b.row(f.record))
		switch kindOf(f.record.Kind) {
		case snapshots.KindCommitted:
			r.Committed++
		case snapshots.KindActive:
			r.Active++
		case snapshots.KindView:
			r.Views++
		}
	}
	r.OldFile, err = storage.Rebuild(ctx, b.root, b.now.Format("20060102T150405Z"), rows)
	return r, err
}

func (b *rebuild) row(r record) storage.Row {
	row := storage.Row{
		ID:    r.ID,
		Info:  snapshots.Info{Kind: kindOf(r.Kind), Name: r.Name, Parent: r.Parent, Labels: r.Labels, Created: r.Created, Updated: r.Updated},
		Usage: snapshots.Usage{Inodes: r.Inodes, Size: r.Size},
	}
	switch row.Info.Kind {
	case snapshots.KindCommitted:
		namespace, _ := splitName(r.Name)
		row.Commit = storage.CommitEntry{
			ID: r.ID, Name: r.Name, Namespace: namespace, ChainID: chainIDOf(r.Name, r.Labels), Parent: r.Parent,
			DiffID: r.Labels[labelDiffID], Entries: r.Entries, Bytes: r.Bytes, Digest: r.Digest,
			Time: r.Created, Strategy: storage.StrategyRebuilt, BootID: b.bootID, RunID: b.runID,
		}
	case snapshots.KindActive:
		chainID, extraction := extractionOf(r.Name, r.Labels)
		row.Open = storage.OpenEntry{
			ID: r.ID, Key: r.Name, Extraction: extraction, ChainID: chainID, Parent: r.Parent,
			Started: r.Created, BootID: b.bootID, RunID: b.runID,
		}
	}
	return row
}

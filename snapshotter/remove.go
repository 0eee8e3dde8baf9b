package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/faults"
	"github.com/durable-snapshotter/durable-snapshotter/internal/gate"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Remove drops the row of an active snapshot, a view, or a committed snapshot
// without children. Its directory goes with the next Cleanup, or at once with
// Config.SyncRemove.
//
// A key that does not exist is no error: containerd's garbage collector asks
// again for what it did not hear the answer to, and one NotFound ends its whole
// sweep (core/metadata/snapshot.go:992).
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	if err := layout.CheckName("key", key); err != nil {
		return err
	}
	if err := s.gate.Open(ctx); err != nil {
		return err
	}
	unlock, err := s.keys.Lock(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	s.actives.StopApply(key)

	var id uint64
	err = s.gate.View(ctx, func(ctx context.Context, _ *storage.Journal) (err error) {
		id, _, _, err = storage.Info(ctx, key)
		return err
	})
	if errdefs.IsNotFound(err) {
		s.actives.Forget(key) // of a row that was taken back
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove %q: %w", key, err)
	}
	inTx := storage.BeforeCommit(ctx, func(ctx context.Context, j *storage.Journal) error {
		defer faults.Point(faults.RemoveInTx)
		return j.Remove(id, time.Now().UTC())
	})
	remove := func() error { return s.overlay.Remove(inTx, key) }
	err = s.gate.Do(ctx, remove)
	// On a full disk, the failure has made room: removing is the way out.
	if gate.IsWriteFailure(err) && fsync.IsFull(err) && s.gate.Open(ctx) == nil {
		err = s.gate.Do(ctx, remove)
	}
	if err != nil {
		return fmt.Errorf("remove %q: %w", key, err)
	}
	faults.Point(faults.RemoveDone)
	s.actives.Forget(key)
	s.layers.Drop(key, id)
	if s.cfg.SyncRemove {
		return s.Cleanup(ctx)
	}
	return nil
}

// Update changes the labels of a snapshot.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	if err := errors.Join(layout.CheckName("name", info.Name), layout.CheckLabels(info.Labels)); err != nil {
		return snapshots.Info{}, err
	}
	if err := s.gate.Open(ctx); err != nil {
		return snapshots.Info{}, err
	}
	unlock, err := s.keys.Lock(ctx, info.Name)
	if err != nil {
		return snapshots.Info{}, err
	}
	defer unlock()
	info.Labels = layout.WithoutOwn(info.Labels)
	inTx := storage.BeforeCommit(ctx, func(ctx context.Context, _ *storage.Journal) error {
		defer faults.Point(faults.SnapshotUpdate)
		id, updated, _, err := storage.Info(ctx, info.Name)
		if err != nil {
			return err
		}
		return s.updateRecord(id, updated)
	})
	err = s.gate.Do(ctx, func() (err error) {
		info, err = s.overlay.Update(inTx, info, fieldpaths...)
		return err
	})
	return info, err
}

// updateRecord carries new labels into a snapshot's record. A snapshot whose
// directory is damaged can still get labels.
func (s *Snapshotter) updateRecord(id uint64, info snapshots.Info) error {
	r, err := layout.ReadRecord(s.root.Dir(id))
	if err != nil {
		return nil
	}
	r.Labels, r.Updated = info.Labels, info.Updated
	return layout.ReplaceRecordSync(s.root.Dir(id), r)
}

// Cleanup deletes every directory that has no row, and returns when they are
// gone, but for those that cannot be deleted now: see setAside and internal/replaced.
// Other calls go on meanwhile. It ends with Unavailable when the daemon stops.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	if err := s.gate.Open(ctx); err != nil {
		return err
	}
	if _, err := s.setAside(ctx, nil); err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	faults.Point(faults.SweepDeleting)
	deleting, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.background, cancel)()
	s.trees.Sweep(deleting)
	s.trees.Delete(deleting)
	if s.background.Err() != nil {
		return fmt.Errorf("clean up: the daemon is stopping: %w", errdefs.ErrUnavailable)
	}
	return ctx.Err()
}

// setAside moves directories without a row from snapshots/ to removing/, where
// their numbers block no new snapshot, and returns how many. Other names in
// snapshots/ than numbers and new-*, which containerd gives a directory until it
// has its number, belong to others and stay. A directory that cannot be moved
// stays, too; so does one with a mount in it, because the mount would move along.
//
// The lock keeps Prepare out, whose directory exists before its row; the rows
// it reads are durable, because this is not reached after a failed transaction. So
// no directory that a row speaks of can be moved (I5).
//
// rows are the names of all rows by id as a start has read them, nil when they are to be read.
func (s *Snapshotter) setAside(ctx context.Context, rows map[uint64]string) (int, error) {
	s.creating.Lock()
	defer s.creating.Unlock()
	names, err := namesBelow(s.root.Snapshots())
	if err != nil {
		return 0, err
	}
	withoutRow := func(name string) bool {
		id, numbered := layout.DirectoryID(name)
		return numbered && rows[id] == ""
	}
	if slices.ContainsFunc(names, withoutRow) {
		// Before anything is moved, containerd's own code has the last word on what rows there are.
		if err := s.gate.View(ctx, func(ctx context.Context, _ *storage.Journal) (err error) {
			rows, err = storage.Keys(ctx)
			return err
		}); err != nil {
			return 0, err
		}
	}
	mounted, err := s.mounted()
	if err != nil {
		s.warnOnce(ctx, "mounts", log.Fields{"error": err}, "mounts below snapshots/ are not known: directories of removed snapshots are left in place")
		return 0, nil
	}
	moved := 0
	for _, name := range names {
		_, numbered := layout.DirectoryID(name)
		if numbered && !withoutRow(name) || s.root.IsArea(name) {
			continue
		}
		dir := filepath.Join(s.root.Snapshots(), name)
		if !numbered && !strings.HasPrefix(name, "new-") {
			s.warnOnce(ctx, "foreign "+name, log.Fields{"path": dir}, "snapshots/ holds something that is not the snapshotter's: it is left alone")
			continue
		}
		if point := mounted[name]; point != "" {
			s.warnOnce(ctx, "mounted "+point, log.Fields{"path": dir, "mount": point, "cure": "unmount it"},
				"the directory of a removed snapshot has a mount in it: it is left in place until the mount is gone")
			continue
		}
		err := os.Rename(dir, filepath.Join(s.root.Removing(), fmt.Sprintf("%s.%s", name, layout.NewRunID())))
		if isNotExist(err) {
			// Or removing/ was removed.
			if err = s.gate.Do(ctx, func() error { return fsync.MkdirAll(s.root.Removing(), 0o700) }); err == nil {
				continue // to the next Cleanup
			}
		}
		if err != nil {
			s.warnOnce(ctx, "stuck "+name, log.Fields{"path": dir, "error": err, "cure": "delete it by hand"},
				"the directory of a removed snapshot cannot be moved: it is left in place")
			continue
		}
		moved++
		log.G(ctx).WithField("directory", name).Debug("directory without a row set aside for deletion")
		faults.Point(faults.SweepSetAside)
	}
	return moved, nil
}

// namesBelow lists a directory, in no order.
func namesBelow(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

// mounted returns, for each entry of snapshots/ with a mount at or below it, one
// of the mount points. It knows the mounts of this process's namespace, with
// which the trees would be deleted.
func (s *Snapshotter) mounted() (map[string]string, error) {
	dir, err := filepath.EvalSymlinks(s.root.Snapshots())
	if err != nil {
		return nil, err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, fmt.Errorf("read the mounts of this namespace: %w", err)
	}
	points := map[string]string{}
	for _, m := range mounts {
		if below, ok := strings.CutPrefix(m.Mountpoint, dir+"/"); ok {
			name, _, _ := strings.Cut(below, "/")
			points[name] = m.Mountpoint
		}
	}
	return points, nil
}

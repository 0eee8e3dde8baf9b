package replaced

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mounts"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// usersFile is the file in a tree of replaced/ that has its users.
const usersFile = "users"

// users are the mounts and rows that may use a tree in replaced/. An overlay
// mount holds inodes and shows the names of its directories as they were, so that
// after an exchange nothing shows which of the two trees it uses. All count that
// exist MountDelay after it, unless they write to a snapshot that was prepared
// after it. Later ones use the new tree.
type users struct {
	Overlays []string `json:"overlays"` // superblocks, "major:minor", that name the layer
	Rows     []uint64 `json:"rows"`     // active snapshots and views on the layer
	Highest  uint64   `json:"highest"`  // number of a snapshot at the time of the exchange
	Complete bool     `json:"settled"`  // Overlays has all
}

// inUse reports whether a tree in replaced/ may be in use, by what is mounted.
func (t *Trees) inUse(ctx context.Context, machine mounts.Machine, dir string) bool {
	name := filepath.Base(dir)
	mounted := map[string]bool{}
	for _, m := range machine.Mounts {
		// Of a bind mount, such as that of a View of one layer, the root is named
		// as it is now.
		if within(m.Root, name) || within(m.Point, name) {
			return true
		}
		mounted[m.Device.String()] = true
	}
	if len(machine.Detached) > 0 {
		return true // nothing shows of which layers
	}
	u, err := readUsers(dir)
	if err == nil && !u.Complete {
		u, err = noteOverlays(dir, u, machine)
	}
	if err != nil {
		t.warnOnce(ctx, "users "+dir, log.Fields{"path": dir, "error": err}, "what uses a replaced tree is not known: it is kept until the next boot")
		return true
	}
	if slices.ContainsFunc(u.Overlays, func(d string) bool { return mounted[d] }) {
		return true
	}
	if machine.Complete {
		return false
	}
	// There may be mounts that this process cannot see. Those of containerd end
	// before their rows do.
	rows, err := t.rowsOn(ctx, 0)
	return err != nil || slices.ContainsFunc(u.Rows, func(id uint64) bool { return slices.Contains(rows, id) })
}

// within reports whether a path leads through a directory of a name.
func within(path, name string) bool { return strings.Contains(path+"/", "/"+name+"/") }

// noteRows writes the users that have a row into a tree.
func (t *Trees) noteRows(ctx context.Context, dir string) (u users, err error) {
	id, err := layout.LayerOf(dir)
	if err != nil {
		return u, err
	}
	if u.Rows, err = t.rowsOn(context.WithoutCancel(ctx), id); err != nil {
		return u, err
	}
	if u.Highest, err = t.highest(context.WithoutCancel(ctx)); err != nil {
		return u, err
	}
	return u, writeUsers(dir, u)
}

// noteOverlays adds the users that are mounted, and writes all into the tree.
func noteOverlays(dir string, u users, machine mounts.Machine) (users, error) {
	id, err := layout.LayerOf(dir)
	if err != nil {
		return u, err
	}
	for _, m := range machine.Mounts {
		if m.Type == "overlay" && namesLayer(m.Options, id) && upperOf(m.Options) <= u.Highest && !slices.Contains(u.Overlays, m.Device.String()) {
			u.Overlays = append(u.Overlays, m.Device.String())
		}
	}
	u.Complete = true
	return u, writeUsers(dir, u)
}

// writeUsers does not sync: the file is of no use after a boot.
func writeUsers(dir string, u users) error {
	data, err := json.Marshal(u)
	if err != nil {
		return err
	}
	next := filepath.Join(dir, usersFile+".new")
	if err := os.WriteFile(next, data, 0o600); err != nil {
		return err
	}
	return os.Rename(next, filepath.Join(dir, usersFile))
}

func readUsers(dir string) (u users, err error) {
	data, err := os.ReadFile(filepath.Join(dir, usersFile))
	if err != nil {
		return u, err
	}
	if err := json.Unmarshal(data, &u); err != nil {
		return users{}, err
	}
	return u, nil
}

// namesLayer reports whether the options of an overlay mount name the directory
// of a snapshot: as an absolute path, below whatever root, or relative, as containerd
// does with many layers. Options without any such directory may hide it.
func namesLayer(options string, id uint64) bool {
	found := false
	for _, match := range layerOption.FindAllStringSubmatch(options, -1) {
		if found = true; match[1] == strconv.FormatUint(id, 10) {
			return true
		}
	}
	return !found && !strings.Contains(options, "lowerdir")
}

// upperOf returns the number of the snapshot that an overlay mount writes to, 0
// when it is read-only.
func upperOf(options string) uint64 {
	match := upperOption.FindStringSubmatch(options)
	if match == nil {
		return 0
	}
	id, err := strconv.ParseUint(match[1], 10, 64)
	if err != nil { // too large for a number of ours
		return 0
	}
	return id
}

var (
	// Directories are separated by colons, options by commas.
	layerOption = regexp.MustCompile(`(?:[/:=]|^)([1-9]\d*)/fs\b`)
	upperOption = regexp.MustCompile(`upperdir=(?:[^,]*/)?([1-9]\d*)/fs(?:,|$)`)
)

// rowsOn returns the active snapshots and views on a committed snapshot, all of
// them when its number is 0.
func (t *Trees) rowsOn(ctx context.Context, layer uint64) (ids []uint64, err error) {
	type row struct {
		id   uint64
		info snapshots.Info
	}
	rows := map[string]row{}
	err = t.gate.View(ctx, func(ctx context.Context, _ *storage.Journal) error {
		return storage.Walk(ctx, func(id uint64, info snapshots.Info, _ snapshots.Usage) error {
			rows[info.Name] = row{id, info}
			return nil
		})
	})
	for _, r := range rows {
		if r.info.Kind == snapshots.KindCommitted {
			continue
		}
		for at := r; at.id != 0; at = rows[at.info.Parent] {
			if layer == 0 || at.id == layer {
				ids = append(ids, r.id)
				break
			}
		}
	}
	slices.Sort(ids)
	return ids, err
}

// highest returns the highest number of a snapshot.
func (t *Trees) highest(ctx context.Context) (highest uint64, err error) {
	err = t.gate.View(ctx, func(ctx context.Context, _ *storage.Journal) error {
		keys, err := storage.Keys(ctx)
		for id := range keys {
			highest = max(highest, id)
		}
		return err
	})
	return highest, err
}

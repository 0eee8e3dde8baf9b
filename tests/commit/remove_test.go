package commit

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestDeletionBlocksNobody deletes a tree that takes its time, while a layer is
// prepared, written, committed and removed. Only who asked for the deletion
// waits for it.
func TestDeletionBlocksNobody(t *testing.T) {
	r, ctx := newRacers(t), t.Context()
	dir := upper(t, must[mounts](t)(r.sn.Prepare(ctx, "big", "")))
	for i := range 100 {
		sub := filepath.Join(dir, fmt.Sprint("dir-", i))
		check(t, os.Mkdir(sub, 0o755))
		for j := range 250 {
			check(t, os.WriteFile(filepath.Join(sub, fmt.Sprint("file-", j)), nil, 0o644))
		}
	}
	check(t, r.sn.Remove(ctx, "big"))
	swept := make(chan error, 1)
	go func() { swept <- r.sn.(snapshots.Cleaner).Cleanup(ctx) }()
	// When it lies in removing/, its deletion is what Cleanup is at.
	waitFor(t, patience, func() error {
		if len(list(t, r.daemon.Root, "removing")) == 0 {
			return fmt.Errorf("Cleanup has not begun")
		}
		return nil
	})
	r.written(t, "small")
	check(t, r.sn.Commit(ctx, "layer", "small"))
	check(t, r.sn.Remove(ctx, "layer"))
	select {
	case err := <-swept:
		t.Errorf("Cleanup (%v) was over before a layer came and went: it was in the way, or the tree is too small", err)
	default:
		check(t, <-swept)
	}
	cleanUp(t, r.sn)
	noOrphans(t, r.daemon)
}

// TestSyncRemove has the directory gone when Remove is answered, which the
// configuration can ask for.
func TestSyncRemove(t *testing.T) {
	disk := newDisk(t, kit.DiskOptions{FS: "ext4", Size: 256 << 20})
	for _, synchronous := range []bool{false, true} {
		d := newDaemon(t, kit.DaemonOptions{
			Dir: disk.Path(fmt.Sprint(synchronous)), Config: fmt.Sprintf("[snapshotter]\nsync_remove = %t\n", synchronous),
		})
		r := racers{daemon: d, sn: start(t, d)}
		r.written(t, "key")
		check(t, r.sn.Remove(t.Context(), "key"))
		left := append(list(t, d.Root, "snapshots"), list(t, d.Root, "removing")...)
		if want := 1; synchronous == (len(left) == want) {
			t.Errorf("sync_remove = %t: after Remove there is %v", synchronous, left)
		}
		cleanUp(t, r.sn)
		noOrphans(t, d)
		check(t, d.Stop())
	}
}

// TestRecoveryIsTold has one of each thing that recovery deals with, and reads
// what it says.
func TestRecoveryIsTold(t *testing.T) {
	r, ctx := newRacers(t), t.Context()
	links := chain(2, "first")
	check(t, links[0].unpack(ctx, r.sn))
	must[string](t)(links[1].prepare(ctx, r.sn))
	must[mounts](t)(r.sn.Prepare(ctx, "default/900/container", links[0].name))
	r.written(t, "orphan")
	check(t, r.sn.Remove(ctx, "orphan"))
	kill(t, r.daemon)
	check(t, os.Mkdir(filepath.Join(r.daemon.Root, "snapshots/new-123"), 0o700)) // of a Prepare
	var numbers []string
	for _, row := range inspect(t, r.daemon).Snapshots {
		numbers = append(numbers, fmt.Sprint(row.ID))
	}

	for _, want := range []map[string]any{
		{"committed": 1., "entries_replayed": 2., "extractions_closed": 1., "directories_removed": 2., "directories_missing": 0.},
		// The entries are still there, and nothing is left to do.
		{"committed": 1., "entries_replayed": 2., "extractions_closed": 0., "directories_removed": 0., "directories_missing": 0.},
	} {
		before := len(must[string](t)(r.daemon.Log()))
		check(t, r.daemon.Start(ctx))
		actions := 0
		for line := range strings.Lines(must[string](t)(r.daemon.Log())[before:]) {
			var said map[string]any
			check(t, json.Unmarshal([]byte(line), &said))
			switch said["msg"] {
			case "recovered":
				for field, n := range want {
					if said[field] != n {
						t.Errorf("recovery says %s=%v, want %v: %s", field, said[field], n, line)
					}
				}
				if _, ok := said["took"]; !ok {
					t.Errorf("recovery does not say what it took: %s", line)
				}
			case "open extraction closed; its layer must be extracted again", "directory without a row set aside for deletion":
				actions++
				if key, ok := said["key"]; ok && key != links[1].key {
					t.Errorf("closed %v, want %s", key, links[1].key)
				}
				if name, ok := said["directory"]; ok && slices.Contains(numbers, fmt.Sprint(name)) {
					t.Errorf("set aside %v", name)
				}
			}
		}
		if n := want["extractions_closed"].(float64) + want["directories_removed"].(float64); float64(actions) != n {
			t.Errorf("%d lines for single actions, want %v", actions, n)
		}
		kill(t, r.daemon)
	}
	// A layer that is gone is said, and its row stays: containerd was promised it.
	row, _ := inspect(t, r.daemon).find(links[0].name)
	check(t, os.RemoveAll(filepath.Dir(layerDir(r.daemon, row.ID))))
	sn := start(t, r.daemon)
	if log := r.daemon.LogTail(3000); !strings.Contains(log, `"directories_missing":1`) || !strings.Contains(log, "the directory of a committed snapshot is missing") {
		t.Errorf("nothing is said of a missing layer: %s", log)
	}
	check(t, sn.Remove(ctx, links[1].key))
}

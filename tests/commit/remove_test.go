package commit

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// hold makes the first process that opens a directory wait for release: a tree
// whose deletion takes as long as the test wants (fanotify(7)).
func hold(t *testing.T, dir string) (opened func() error, release func()) {
	t.Helper()
	fd := must[int](t)(unix.FanotifyInit(unix.FAN_CLASS_CONTENT|unix.FAN_NONBLOCK|unix.FAN_CLOEXEC, unix.O_RDONLY))
	closed := sync.OnceFunc(func() { unix.Close(fd) }) // lets all processes go on
	t.Cleanup(closed)
	check(t, unix.FanotifyMark(fd, unix.FAN_MARK_ADD, unix.FAN_OPEN_PERM|unix.FAN_ONDIR, unix.AT_FDCWD, dir))
	return func() error {
		var event unix.FanotifyEventMetadata
		buf := unsafe.Slice((*byte)(unsafe.Pointer(&event)), unsafe.Sizeof(event))
		if _, err := unix.Read(fd, buf); err != nil {
			return fmt.Errorf("no process has opened %s: %w", dir, err)
		}
		unix.Close(int(event.Fd))
		return nil
	}, closed
}

// TestDeletionBlocksNobody deletes a tree that does not go away, while a layer is
// prepared, written, committed and removed. Only the caller of the deletion waits
// for it.
func TestDeletionBlocksNobody(t *testing.T) {
	r, ctx := newRacers(t), t.Context()
	r.written(t, "slow")
	row, _ := kittest.Inspect(t, r.daemon).Find("slow")
	opened, release := hold(t, filepath.Join(r.daemon.LayerDir(row.ID), "dir"))
	check(t, r.sn.Remove(ctx, "slow"))
	swept := make(chan error, 1)
	go func() { swept <- r.sn.(snapshots.Cleaner).Cleanup(ctx) }()
	waitFor(t, 30*time.Second, opened)
	// Should it block another call after all, the test is to end.
	defer time.AfterFunc(time.Minute, release).Stop()

	r.written(t, "quick")
	check(t, r.sn.Commit(ctx, "layer", "quick"))
	r.whole(t, "layer", "quick")
	check(t, r.sn.Remove(ctx, "layer"))
	select {
	case err := <-swept:
		t.Errorf("Cleanup (%v) did not wait for the deletion", err)
	default:
		release()
		check(t, <-swept)
	}
	cleanUp(t, r.sn)
	noOrphans(t, r.daemon)
}

// TestSyncRemove has the directory gone when Remove is answered, which the
// configuration can turn on.
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
// what it logs.
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
	for _, row := range kittest.Inspect(t, r.daemon).Snapshots {
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
			var entry map[string]any
			check(t, json.Unmarshal([]byte(line), &entry))
			switch entry["msg"] {
			case "recovered":
				for field, n := range want {
					if entry[field] != n {
						t.Errorf("recovery logs %s=%v, want %v: %s", field, entry[field], n, line)
					}
				}
				if _, ok := entry["took"]; !ok {
					t.Errorf("recovery does not log what it took: %s", line)
				}
			case "open extraction closed; its layer must be extracted again", "directory without a row set aside for deletion":
				actions++
				if key, ok := entry["key"]; ok && key != links[1].key {
					t.Errorf("closed %v, want %s", key, links[1].key)
				}
				if name, ok := entry["directory"]; ok && slices.Contains(numbers, fmt.Sprint(name)) {
					t.Errorf("set aside %v", name)
				}
			}
		}
		if n := want["extractions_closed"].(float64) + want["directories_removed"].(float64); float64(actions) != n {
			t.Errorf("%d lines for single actions, want %v", actions, n)
		}
		kill(t, r.daemon)
	}
	// A layer that is gone is logged, and its row stays: containerd was promised it.
	row, _ := kittest.Inspect(t, r.daemon).Find(links[0].name)
	check(t, os.RemoveAll(filepath.Dir(r.daemon.LayerDir(row.ID))))
	sn := start(t, r.daemon)
	if log := r.daemon.LogTail(3000); !strings.Contains(log, `"directories_missing":1`) || !strings.Contains(log, "the directory of a committed snapshot is missing") {
		t.Errorf("a missing layer is not logged: %s", log)
	}
	check(t, sn.Remove(ctx, links[1].key))
}

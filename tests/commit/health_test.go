package commit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestHealthFollowsTheDisk has a disk that cannot write metadata.db, and then
// can again: health goes down and comes back without a restart, what was active
// meanwhile is refused for good, and new layers are welcome.
func TestHealthFollowsTheDisk(t *testing.T) {
	for _, fs := range []disk.FS{disk.Ext4, disk.XFS} {
		t.Run(string(fs), func(t *testing.T) {
			a := newAiling(t, fs, kit.DaemonOptions{})
			sn := a.begin(t)
			ctx := t.Context()
			links := chain(layers, "first")
			check(t, links[0].unpack(ctx, sn))
			check(t, writeLayer(must[string](t)(links[1].prepare(ctx, sn)), 1))

			// Nothing of the file system's own: without its journal or its inodes
			// none comes back before it is mounted again. Not metadata.db alone:
			// the daemon would write it to another place.
			places := append(a.free(t), blocks(t, filepath.Join(a.daemon.Root, "metadata.db"))...)
			a.strike(t, disk.Fault{Op: disk.OpWrite, Ranges: places, Errno: syscall.EIO})
			if err := links[1].commit(ctx, sn); err == nil || !strings.Contains(err.Error(), "input/output error") {
				t.Fatalf("commit: %v, want an input/output error", err)
			}
			if a.daemon.Healthy(ctx) == nil {
				t.Error("health reports SERVING while metadata.db cannot be written")
			}
			if _, err := links[2].prepare(ctx, sn); !errdefs.IsUnavailable(err) {
				t.Errorf("prepare: %v, want unavailable", err)
			}
			if info, err := sn.Stat(ctx, links[0].name); err != nil || info.Kind != snapshots.KindCommitted {
				t.Errorf("stat of a layer from before: %v, %v", info.Kind, err)
			}

			check(t, a.Heal())
			waitFor(t, 30*time.Second, func() error { return a.daemon.Healthy(ctx) })
			if err := links[1].commit(ctx, sn); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("I4: commit after the disk got well: %v, want failed precondition", err)
			}
			poisoned := ""
			for _, e := range kittest.Inspect(t, a.daemon).Journal.Open {
				if e.Key == links[1].key {
					poisoned = e.Poisoned
				}
			}
			if !strings.Contains(poisoned, "input/output error") {
				t.Errorf("the journal gives %q as the reason for refusing %s", poisoned, links[1].key)
			}
			check(t, sn.Remove(ctx, links[1].key))
			check(t, chain(layers, "again")[1].unpack(ctx, sn))
			check(t, chain(layers, "again")[2].unpack(ctx, sn))
			log := must[string](t)(a.daemon.Log())
			for _, event := range []string{"write_failed", "writes_blocked", "writes_resumed"} {
				if n := strings.Count(log, `"event":"`+event+`"`); n != 1 {
					t.Errorf("the log has the event %s %d times, want once", event, n)
				}
			}
			a.cut(t, false)
			p := newPass(a, reference(t, layers))
			for _, l := range links {
				p.acked[l.name] = l.number
			}
			sn = must[snapshots.Snapshotter](t)(a.boot(t))
			p.whole(t, ctx, sn, "after the boot")
			for _, wrong := range p.wrong {
				t.Error(wrong)
			}
			a.cut(t, true)
		})
	}
}

// TestHealthNoticesReadOnly has the kernel make the file system read-only, as it
// does with errors=remount-ro, under a daemon that no client calls.
func TestHealthNoticesReadOnly(t *testing.T) {
	d := newDisk(t, kit.DiskOptions{FS: "ext4", Size: 256 << 20, Mount: "errors=remount-ro"})
	r := racers{daemon: newDaemon(t, kit.DaemonOptions{Dir: d.Path("durable")})}
	r.sn = start(t, r.daemon)
	ctx := t.Context()
	done := chain(1, "")[0]
	check(t, done.unpack(ctx, r.sn))

	trigger := filepath.Join("/sys/fs/ext4", filepath.Base(d.Device()), "trigger_fs_error")
	check(t, os.WriteFile(trigger, []byte("a test requested this error\n"), 0))
	waitFor(t, 30*time.Second, func() error {
		if r.daemon.Healthy(ctx) == nil {
			return errors.New("health reports SERVING on a file system that is read-only")
		}
		return nil
	})
	if _, err := r.sn.Prepare(ctx, "key", done.name); !errdefs.IsUnavailable(err) {
		t.Errorf("prepare: %v, want unavailable", err)
	}
	if info, err := r.sn.Stat(ctx, done.name); err != nil || info.Kind != snapshots.KindCommitted {
		t.Errorf("stat: %v, %v, want it committed", info.Kind, err)
	}
	kill(t, r.daemon)
	check(t, d.Remount())
	r.sn = start(t, r.daemon)
	r.written(t, "key")
}

// TestReadsOutliveTheFileSystem has the file system shut itself down, as ext4 and
// xfs do when their journal cannot be written, under a daemon that then tries to
// put on record that many snapshots are refused, and needs more room in
// metadata.db for it. It cannot; it must still know what it has.
func TestReadsOutliveTheFileSystem(t *testing.T) {
	for _, fs := range []disk.FS{disk.Ext4, disk.XFS} {
		t.Run(string(fs), func(t *testing.T) {
			a := newAiling(t, fs, kit.DaemonOptions{})
			sn := a.begin(t)
			ctx := t.Context()
			done := chain(1, "")[0]
			check(t, done.unpack(ctx, sn))
			key := func(n int) string { return fmt.Sprintf("default/%d/%s", 500+n, strings.Repeat("k", 2000)) }
			rows := 0
			for grows := false; !grows; rows++ {
				must[mounts](t)(sn.Prepare(ctx, key(rows), done.name))
				// An entry with such a key fills a page of its own.
				used, free, size := databasePages(t, a.daemon)
				grows = rows > 10 && used+rows-free > size
			}
			check(t, disk.Shutdown(a.dir))
			if err := sn.Remove(ctx, key(0)); err == nil {
				t.Error("remove on a file system that is shut down: no error")
			}
			if a.daemon.Healthy(ctx) == nil {
				t.Error("health reports SERVING on a file system that is shut down")
			}
			n := 0
			if err := sn.Walk(ctx, func(context.Context, snapshots.Info) error { n++; return nil }); err != nil || n != rows+1 {
				t.Errorf("walk: %d rows, %v, want %d", n, err, rows+1)
			}
			if info, err := sn.Stat(ctx, done.name); err != nil || info.Kind != snapshots.KindCommitted {
				t.Errorf("stat: %v, %v, want it committed", info.Kind, err)
			}
			a.cut(t, false)
			sn = must[snapshots.Snapshotter](t)(a.boot(t))
			check(t, sn.Remove(ctx, key(0)))
			a.cut(t, true)
		})
	}
}

// databasePages counts the pages of metadata.db.
func databasePages(t *testing.T, d *kit.Daemon) (used, free, size int) {
	t.Helper()
	path := filepath.Join(d.Root, "metadata.db")
	check(t, viewCopy(t, path, func(db *bolt.DB, tx *bolt.Tx) error {
		page := db.Info().PageSize
		used, free, size = int(tx.Size())/page, db.Stats().FreePageN, int(must[os.FileInfo](t)(os.Stat(path)).Size())/page
		return nil
	}))
	return used, free, size
}

package commit

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// small is a disk that is soon full, with one layer on it that was there before.
type small struct {
	racers
	disk  *kit.Disk
	links []link
	room  int64 // what was free
}

func newSmall(t *testing.T, fs disk.FS) *small {
	t.Helper()
	s := &small{disk: newDisk(t, kit.DiskOptions{FS: string(fs), Size: fs.MinSize()}), links: chain(layers, "first")}
	s.daemon = newDaemon(t, kit.DaemonOptions{Dir: s.disk.Path("durable")})
	s.sn, s.want = start(t, s.daemon), reference(t, layers)
	check(t, s.links[0].unpack(t.Context(), s.sn))
	s.room = available(t, s.disk.Path())
	return s
}

// fill writes to a directory until nothing fits any more, not even a sector.
func fill(t *testing.T, dir string) {
	t.Helper()
	for size := 1 << 20; size >= 512; size /= 2 {
		f, err := os.Create(filepath.Join(dir, fmt.Sprintf("fill-%d", size)))
		for err == nil {
			if _, err = f.Write(make([]byte, size)); err == nil {
				err = f.Sync()
			}
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
		if f != nil {
			_ = f.Close() // may report again that the disk is full
		}
	}
}

// available returns how much can be written to a file system, in bytes.
func available(t *testing.T, dir string) int64 {
	t.Helper()
	f := must[*os.File](t)(os.Open(dir))
	defer f.Close()
	check(t, unix.Syncfs(int(f.Fd()))) // of what was deleted a moment ago
	var st unix.Statfs_t
	check(t, unix.Fstatfs(int(f.Fd()), &st))
	return int64(st.Bavail) * st.Bsize
}

// roomy checks that what was taken has been given back. metadata.db may have
// grown.
func (s *small) roomy(t *testing.T) {
	t.Helper()
	if now := available(t, s.disk.Path()); now < s.room-1<<20 {
		t.Errorf("%d KiB are available, and %d were before", now>>10, s.room>>10)
	}
}

// refusesFull checks an error of a full disk.
func refusesFull(t *testing.T, what string, err error) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), "no space left on device") {
		t.Errorf("%s on a full disk: %v, want an error that reports it", what, err)
	}
}

// committed checks that of the chain exactly the first n layers are committed,
// and whole.
func (s *small) committed(t *testing.T, n int) {
	t.Helper()
	for i, l := range s.links {
		if i >= n {
			s.absent(t, l.name)
			continue
		}
		info, err := s.sn.Stat(t.Context(), l.name)
		row, ok := kittest.Inspect(t, s.daemon).Find(l.name)
		if err != nil || info.Kind != snapshots.KindCommitted || !ok {
			t.Fatalf("stat %s: %v, %v, on record: %t; want it committed", l.name, info.Kind, err, ok)
		}
		sameTree(t, l.name, s.daemon.LayerDir(row.ID), s.want[i])
	}
}

// rest unpacks what is missing of the chain, and verifies it after a restart.
func (s *small) rest(t *testing.T, n int) {
	t.Helper()
	for _, l := range chain(layers, "again")[n:] {
		check(t, l.unpack(t.Context(), s.sn))
	}
	check(t, s.daemon.Restart(t.Context()))
	s.sn = kittest.Connect(t, s.daemon)
	s.committed(t, layers)
	cleanUp(t, s.sn)
	noOrphans(t, s.daemon)
}

// TestFullInExtraction has a layer fill the disk. The daemon goes on, also when
// it is started on the full disk, and the layer can be removed.
func TestFullInExtraction(t *testing.T) {
	for _, fs := range []disk.FS{disk.Ext4, disk.XFS, disk.Btrfs} {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s restart=%t", fs, restart), func(t *testing.T) {
				s, ctx := newSmall(t, fs), t.Context()
				fill(t, must[string](t)(s.links[1].prepare(ctx, s.sn)))
				refusesFull(t, "commit", s.links[1].commit(ctx, s.sn))
				other := chain(layers, "other")[1]
				_, err := other.prepare(ctx, s.sn)
				refusesFull(t, "prepare", err)
				s.committed(t, 1)
				if restart {
					check(t, s.daemon.Restart(ctx))
					s.sn = kittest.Connect(t, s.daemon)
					s.committed(t, 1)
				}
				if err := s.daemon.Healthy(ctx); err != nil {
					t.Errorf("on a full disk, where removing works: %v", err)
				}
				check(t, s.sn.Remove(ctx, s.links[1].key))
				check(t, s.sn.Remove(ctx, other.key))
				cleanUp(t, s.sn)
				noOrphans(t, s.daemon)
				s.roomy(t)
				s.rest(t, 1)
			})
		}
	}
}

// TestQuota starts the daemon where a quota is used up: a btrfs subvolume whose
// qgroup has a limit. What is there is served, and removing makes room.
func TestQuota(t *testing.T) {
	d := newDisk(t, kit.DiskOptions{FS: "btrfs", Size: disk.Btrfs.MinSize()})
	btrfs := func(args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), "btrfs", args...).CombinedOutput(); err != nil {
			t.Fatalf("btrfs %v: %v: %s", args, err, out)
		}
	}
	btrfs("quota", "enable", d.Path())
	btrfs("subvolume", "create", d.Path("durable"))
	btrfs("qgroup", "limit", "32M", d.Path("durable"))
	daemon := newDaemon(t, kit.DaemonOptions{Dir: d.Path("durable")})
	sn, links, ctx := start(t, daemon), chain(layers, "first"), t.Context()
	check(t, links[0].unpack(ctx, sn))
	dir := must[string](t)(links[1].prepare(ctx, sn))
	for size := 1 << 20; size >= 512; size /= 2 {
		var err error
		for i := 0; err == nil; i++ {
			var f *os.File
			if f, err = os.Create(filepath.Join(dir, fmt.Sprintf("fill-%d-%d", size, i))); err == nil {
				if _, err = f.Write(make([]byte, size)); err == nil {
					err = f.Sync()
				}
				_ = f.Close() // may report again that the quota is used up
			}
		}
		if !errors.Is(err, syscall.EDQUOT) {
			t.Fatalf("the quota refuses with %v", err)
		}
	}
	for range 2 {
		check(t, daemon.Kill())
		sn = start(t, daemon)
		if _, err := sn.Stat(ctx, links[0].name); err != nil {
			t.Fatal(err)
		}
	}
	check(t, sn.Remove(ctx, links[1].key))
	cleanUp(t, sn)
	waitFor(t, 30*time.Second, func() error { // btrfs counts what is free when a transaction ends
		if out, err := exec.CommandContext(ctx, "btrfs", "filesystem", "sync", d.Path()).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		_, err := chain(layers, "again")[1].prepare(ctx, sn)
		return err
	})
	noOrphans(t, daemon)
}

// TestFullInCommit has another process take the last space between the extraction
// of a layer and its Commit.
func TestFullInCommit(t *testing.T) {
	for _, fs := range []disk.FS{disk.Ext4, disk.XFS, disk.Btrfs} {
		t.Run(string(fs), func(t *testing.T) {
			s, ctx := newSmall(t, fs), t.Context()
			check(t, writeLayer(must[string](t)(s.links[1].prepare(ctx, s.sn)), 1))
			others := s.disk.Path("others")
			check(t, os.Mkdir(others, 0o700))
			fill(t, others)
			refusesFull(t, "commit", s.links[1].commit(ctx, s.sn))
			s.committed(t, 1)

			check(t, os.RemoveAll(others))
			available(t, s.disk.Path())
			// Nothing was lost when the kernel refused a write at once; then the
			// snapshot is still good.
			switch err := s.links[1].commit(ctx, s.sn); {
			case err == nil:
				s.committed(t, 2)
				s.rest(t, 2)
			case errdefs.IsFailedPrecondition(err):
				check(t, s.sn.Remove(ctx, s.links[1].key))
				s.rest(t, 1)
			default:
				t.Errorf("commit when there is room: %v", err)
			}
			s.roomy(t)
		})
	}
}

// TestFullInPull pulls an image that the disk has no room for, and then one that
// it has.
func TestFullInPull(t *testing.T) {
	d := newDisk(t, kit.DiskOptions{FS: "ext4", Size: disk.Ext4.MinSize()})
	n := newNode(t, d.Path("durable"))
	large := must[kit.Image](t)(kit.Runnable(t.Context()))
	large.Layers = append(large.Layers, kit.NewLayer(kit.Gzip, kit.File("large", 0o644, strings.Repeat("large", 20<<20))))
	tooLarge := must[kit.Pushed](t)(n.Push(t.Context(), "too-large", large))
	fits := n.push(t, "fits", must[kit.Image](t)(kit.Runnable(t.Context())))
	start(t, n.next(t, ""))
	check(t, unavailable(t, nil, func() error { return n.pull(t.Context(), "durable", fits) }))
	check(t, n.remove(t.Context(), fits))
	n.only(t)
	room := available(t, d.Path())

	refusesFull(t, "pull", n.pull(t.Context(), "durable", tooLarge))
	if name, ok := n.recorded(t)[tooLarge.Top()]; ok {
		t.Errorf("containerd has recorded that %s is committed", name)
	}
	waitFor(t, 30*time.Second, func() error {
		// containerd collects what the pull has left when it sees fit; this
		// requests it.
		if _, err := n.Containerd.Ctr(t.Context(), "content", "prune", "references"); err != nil {
			return err
		}
		if now := available(t, d.Path()); now < room-1<<20 {
			return fmt.Errorf("%d KiB are available, and %d were before the pull", now>>10, room>>10)
		}
		return nil
	})
	check(t, n.pull(t.Context(), "durable", fits))
	n.whole(t, fits, n.recorded(t))
	check(t, n.remove(t.Context(), fits))
	n.only(t)
}

package commit

import (
	"bytes"
	"errors"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// ailing is a disk that fails on request, with a daemon's root on it. Every pass
// of a test begins with the same bytes.
type ailing struct {
	*disk.Disk
	fs     disk.FS
	dir    string // mount point
	base   []byte // the disk at the beginning of each pass
	daemon *kit.Daemon

	journal, data []disk.Range // the file system's journal, and the rest
}

// newAiling makes the disk, lets a daemon make its empty root on it, and keeps
// the bytes. options are the daemon's.
func newAiling(t *testing.T, fs disk.FS, o kit.DaemonOptions) *ailing {
	t.Helper()
	a := &ailing{Disk: must[*disk.Disk](t)(disk.Start(fs.MinSize())), fs: fs, dir: t.TempDir()}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	check(t, a.Format(fs))
	check(t, a.Mount(fs, a.dir))
	// Before Close unmounts: a daemon that still runs would keep the disk busy.
	o.Dir = filepath.Join(a.dir, "durable")
	a.daemon = newDaemon(t, o)
	check(t, a.daemon.Start(t.Context()))
	check(t, a.daemon.Stop())
	check(t, a.Unmount())

	a.journal = must[[]disk.Range](t)(a.Journal(fs))
	a.data = a.Outside(a.journal)
	a.base = bytes.Clone(a.Image())
	check(t, a.Watch())
	return a
}

// begin puts the disk back to its beginning, mounts it and starts the daemon.
func (a *ailing) begin(t *testing.T) snapshots.Snapshotter {
	t.Helper()
	a.cut(t, true) // when the last pass ended in the middle
	for _, r := range must[[]disk.Range](t)(a.Touched()) {
		copy(a.Image()[r.Offset:r.Offset+r.Length], a.base[r.Offset:])
	}
	check(t, a.Watch())
	return must[snapshots.Snapshotter](t)(a.boot(t))
}

// boot mounts what is on the disk now and starts the daemon. The error is that
// of the daemon.
func (a *ailing) boot(t *testing.T) (snapshots.Snapshotter, error) {
	t.Helper()
	check(t, a.DropCache())
	check(t, a.Mount(a.fs, a.dir))
	if err := a.daemon.Start(t.Context()); err != nil {
		return nil, err
	}
	return kittest.Connect(t, a.daemon), nil
}

// cut ends daemon and file system. With power, the file system may still write
// what it holds in memory; without, it may not (btrfs has no switch for that).
// The disk is healthy afterwards.
func (a *ailing) cut(t *testing.T, power bool) {
	t.Helper()
	kill(t, a.daemon)
	if !power && a.fs != disk.Btrfs {
		// xfs may have shut itself down already, and reports it with EIO.
		if err := disk.Shutdown(a.dir); err != nil && !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
	}
	check(t, a.Heal())
	check(t, a.Unmount())
}

// strike arms a fault; hits counts later what it has met.
func (a *ailing) strike(t *testing.T, f disk.Fault) {
	t.Helper()
	must[int](t)(a.Inject(f))
}

func (a *ailing) hits(t *testing.T) int {
	t.Helper()
	n := 0
	for _, f := range must[disk.Stats](t)(a.Stats()).Faults {
		n += f.Hits
	}
	return n
}

// blocks returns where the pages of a file lie on its disk, holes left out; it
// queries the file system (FIBMAP of fs/ioctl.c, which ext4 and xfs answer).
func blocks(t *testing.T, path string) []disk.Range {
	t.Helper()
	const fibmap, size = 1, 4096
	f := must[*os.File](t)(os.Open(path))
	defer f.Close()
	pages := must[os.FileInfo](t)(f.Stat()).Size() / size
	var ranges []disk.Range
	for page := range pages {
		block := int32(page)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fibmap, uintptr(unsafe.Pointer(&block))); errno != 0 {
			t.Fatalf("find page %d of %s: %v", page, path, errno)
		}
		if block != 0 {
			ranges = append(ranges, disk.Range{Offset: int64(block) * size, Length: size})
		}
	}
	if len(ranges) == 0 {
		t.Fatalf("%s has no page on the disk", path)
	}
	return ranges
}

// free returns the blocks that belong to nothing, once everything that is in
// memory has its place.
func (a *ailing) free(t *testing.T) (ranges []disk.Range) {
	t.Helper()
	f := must[*os.File](t)(os.Open(a.dir))
	defer f.Close()
	check(t, unix.Syncfs(int(f.Fd())))
	if a.fs == disk.Ext4 {
		ranges = a.freeInBitmaps(t)
	} else {
		ranges = freeInMap(t, f)
	}
	if len(ranges) == 0 {
		t.Fatalf("%s has no free blocks", a.dir)
	}
	return ranges
}

// freeInBitmaps runs dumpe2fs. The kernel's own map counts blocks that it keeps
// ready for files that grow as used.
func (a *ailing) freeInBitmaps(t *testing.T) (ranges []disk.Range) {
	t.Helper()
	out := must[[]byte](t)(exec.CommandContext(t.Context(), "dumpe2fs", a.Device()).Output())
	for line := range strings.Lines(string(out)) {
		list, ok := strings.CutPrefix(strings.TrimSpace(line), "Free blocks: ")
		if !ok || !strings.HasPrefix(line, "  ") {
			continue // the number of them, in the superblock's part
		}
		for _, part := range strings.Split(list, ", ") {
			first, last, ok := strings.Cut(part, "-")
			if !ok {
				last = first
			}
			from, to := must[int64](t)(strconv.ParseInt(first, 10, 64)), must[int64](t)(strconv.ParseInt(last, 10, 64))
			ranges = append(ranges, disk.Range{Offset: from * 4096, Length: (to - from + 1) * 4096})
		}
	}
	return ranges
}

// freeInMap queries the file system (FS_IOC_GETFSMAP of linux/fsmap.h).
func freeInMap(t *testing.T, f *os.File) (ranges []disk.Range) {
	t.Helper()
	const getfsmap, ownerFree, special, most = 0xc0c0583b, 1, 0x10, 4096
	type extent struct {
		device, flags                  uint32
		physical, owner, offset, bytes uint64
		_                              [3]uint64
	}
	query := new(struct {
		iflags, oflags, count, entries uint32
		_                              [6]uint64
		low, high                      extent
		found                          [most]extent
	})
	query.count = most
	query.high = extent{device: math.MaxUint32, flags: math.MaxUint32, physical: math.MaxUint64, owner: math.MaxUint64, offset: math.MaxUint64}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), getfsmap, uintptr(unsafe.Pointer(query))); errno != 0 {
		t.Fatalf("map the blocks of %s: %v", f.Name(), errno)
	}
	if query.entries == most {
		t.Fatalf("%s has more than %d extents", f.Name(), most)
	}
	for _, e := range query.found[:query.entries] {
		if e.flags&special != 0 && e.owner == ownerFree {
			ranges = append(ranges, disk.Range{Offset: int64(e.physical), Length: int64(e.bytes)})
		}
	}
	return ranges
}

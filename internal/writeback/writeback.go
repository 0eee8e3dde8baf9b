// Package writeback has the kernel begin to write what another program extracts while that
// extracts it: a Commit, which waits until all of it is on the disk, then has less to wait for.
//
// It makes nothing durable, and nothing depends on it: the sync of the Commit does, and
// reports each error. What it cannot see, or is too much to be followed, is written then.
package writeback

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/idle"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
)

const (
	// large is the size of files that are worth a request of their own. What is smaller costs
	// the disk more requests, and the processor more time, than it saves.
	large = 64 << 10

	// often and seldom are the pauses between passes while files come, and while none do: an
	// extraction begins when its blob is fetched, which may take an hour.
	often, seldom = 200 * time.Millisecond, 2 * time.Second
	// share is the part of the time that passes may take: one in so many.
	share = 20
	// patience is how long nothing more may come before the rest is left to the Commit.
	patience = 15 * time.Minute

	// still is in how many passes a file must not have grown to be complete.
	still = 5

	// Of a tree with more directories, or a directory with more names, the rest is left to
	// the Commit, too.
	mostDirs, mostNames = 8192, 32768
)

// Follow begins the writing of the large files below root as they come, until ctx ends, and calls grown with
// the bytes that have come since it did so last, of all regular files. It
// opens nothing but regular files and directories of this tree: neither what a link leads
// to, nor what is mounted there, nor a device. Times of access stay as they are.
func Follow(ctx context.Context, root string, grown func(bytes int64)) {
	// As tree.OpenAt below: where a filter of system calls refuses it, all is left to the Commit.
	fd, err := unix.Openat2(unix.AT_FDCWD, root, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC})
	if err != nil {
		return
	}
	defer unix.Close(fd) // only a place to resolve names from
	f := newFollower(fd, begin)
	pause, last := often, time.Now()
	for idle.Rest(ctx, pause) {
		began := time.Now()
		news := f.pass(ctx)
		if f.grown > 0 {
			grown(f.grown)
		}
		if news {
			pause, last = often, began
		} else {
			pause = min(2*pause, seldom)
		}
		if f.names > 0 && began.Sub(last) > patience {
			return
		}
		pause = max(pause, share*time.Since(began))
	}
}

// begin has the kernel begin to write a file.
func begin(fd int) {
	// An error of the disk is for the descriptor of the Commit, which was there before.
	_ = unix.SyncFileRange(fd, 0, 0, unix.SYNC_FILE_RANGE_WRITE)
}

// follower is what is known of a tree.
type follower struct {
	root   int          // O_PATH
	begin  func(fd int) // is called with a large file that has grown
	dirs   map[string]*dir
	names  int                // in all directories
	coming map[string]*growth // files that may not be complete yet
	grown  int64              // bytes that the last pass has found more
}

// growth is that of a file.
type growth struct {
	size  int64
	held  int64 // without holes
	still int   // passes in which it has not grown
}

// dir is a directory that is followed.
type dir struct {
	changed time.Time // its ctime when its names were read
	read    time.Time
	names   map[string]struct{}
}

func newFollower(root int, begin func(fd int)) *follower {
	return &follower{root: root, begin: begin, dirs: map[string]*dir{".": {}}, coming: map[string]*growth{}}
}

// pass visits what is new since the last one, and reports whether anything is.
func (f *follower) pass(ctx context.Context) (news bool) {
	f.grown = 0
	for rel := range f.coming {
		if ctx.Err() != nil {
			return false
		}
		news = f.file(rel) || news
	}
	var changed []string
	for rel, d := range f.dirs {
		var st unix.Stat_t
		if unix.Fstatat(f.root, rel, &st, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT) != nil {
			continue
		}
		at := time.Unix(st.Ctim.Unix())
		// The kernel stamps with the granularity of its clock: more names may have come at once.
		if at.Equal(d.changed) && d.read.Sub(at) > 100*time.Millisecond {
			continue
		}
		news = news || !at.Equal(d.changed)
		d.changed = at
		changed = append(changed, rel)
	}
	for len(changed) > 0 && ctx.Err() == nil {
		rel := changed[len(changed)-1]
		changed = append(changed[:len(changed)-1], f.read(rel)...)
	}
	return news
}

// read visits the names in a directory that are new, and returns new directories among them.
func (f *follower) read(rel string) (dirs []string) {
	d := f.dirs[rel]
	fd, err := tree.OpenAt(f.root, rel, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOATIME)
	if err != nil {
		return nil
	}
	open := os.NewFile(uintptr(fd), rel)
	defer open.Close() // only read from
	d.read = time.Now()
	for {
		entries, err := open.ReadDir(256)
		for _, e := range entries {
			if _, known := d.names[e.Name()]; known || f.names >= mostNames {
				continue
			}
			if d.names == nil {
				d.names = map[string]struct{}{}
			}
			d.names[e.Name()] = struct{}{}
			f.names++
			child := filepath.Join(rel, e.Name())
			switch {
			case e.Type().IsRegular():
				f.file(child)
			case e.IsDir() && len(f.dirs) < mostDirs:
				f.dirs[child] = &dir{}
				dirs = append(dirs, child)
			}
		}
		if err != nil {
			return dirs // io.EOF, too
		}
	}
}

// file begins the writing of a file that is large, and has it visited again while it may not
// be complete. It reports whether it has grown.
func (f *follower) file(rel string) (grown bool) {
	var st unix.Stat_t
	if unix.Fstatat(f.root, rel, &st, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT) != nil {
		delete(f.coming, rel)
		return false
	}
	g := f.coming[rel]
	// On ext4, xfs and btrfs the blocks of a file include those that it will get when it is
	// written (getattr of each). A hole has none.
	held, before := min(st.Size, st.Blocks*512), int64(0)
	if g != nil {
		before, g.held = g.held, held
	}
	f.grown += max(0, held-before)
	switch {
	case time.Since(time.Unix(st.Mtim.Unix())) > 2*time.Second:
		// The extraction gives a complete file the time that its archive has.
		delete(f.coming, rel)
		grown = g == nil || st.Size != g.size
	case g == nil || st.Size != g.size:
		f.coming[rel] = &growth{size: st.Size, held: held}
		grown = true
	default:
		if g.still++; g.still == still {
			delete(f.coming, rel)
		}
	}
	if grown && st.Size >= large {
		f.write(rel)
	}
	return grown
}

// write begins the writing of a file. To open a device may do something: it is known to be a
// regular file before.
func (f *follower) write(rel string) {
	probe, err := tree.OpenAt(f.root, rel, unix.O_PATH)
	if err != nil {
		return
	}
	defer unix.Close(probe) // only a name
	var st unix.Stat_t
	if unix.Fstat(probe, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return
	}
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(probe), unix.O_RDONLY|unix.O_NOATIME|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	f.begin(fd)
	_ = unix.Close(fd) // only read from
}

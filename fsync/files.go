package fsync

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Mode is how the tree of an extraction is made durable, where there is a choice.
type Mode string

// The modes. Without [OneJournal] all of them are Syncfs.
const (
	Auto     Mode = "auto"   // OwnFiles while others have much to be written, else Syncfs
	Syncfs   Mode = "syncfs" // always syncfs(2)
	OwnFiles Mode = "files"  // the files of the tree alone, if there are not too many
)

const (
	// filesOfOne is how many files one Files keeps open at most, filesOfAll how many all
	// of them do.
	filesOfOne = 16 << 10
	filesOfAll = 32 << 10
	// atOnce is how many files are waited for side by side.
	atOnce = 8
	// little is how many bytes others may have to write without any effect on Busy.
	little = 64 << 20
	// request is how many bytes a slow disk writes in the time of one more request: an
	// eMMC has 40 MB and 1,000 requests per second.
	request = 32 << 10
)

var (
	// room is how many more files may be kept open.
	room = func() *atomic.Int64 {
		var limit unix.Rlimit
		n := new(atomic.Int64)
		if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil {
			n.Store(int64(min(filesOfAll, limit.Cur/2)))
		}
		return n
	}()
	// waiting is how many bytes of kept files are not on their way to the disk.
	waiting atomic.Int64
)

// Files are regular files that this process has written, to make them durable without what
// others have written to the same file system. Each is kept open: a descriptor that was
// there before the first write is the only one that reports every error of it.
//
// A nil Files keeps nothing. Add may be called from many goroutines, the other methods from
// one, after it.
type Files struct {
	dir string

	mu      sync.Mutex
	begun   []int // descriptors of files whose writing has been started
	rest    []int // of the others
	waiting int64 // bytes of the others, in whole pages
	over    bool  // a file was not kept

	ahead     bool                  // Begin was called
	beginning sync.WaitGroup        // of Begin
	failed    atomic.Pointer[error] // what it met
}

// NewFiles returns Files for the file system of the directory dir. It must have one journal,
// see [OneJournal].
func NewFiles(dir string) *Files { return &Files{dir: dir} }

// Add takes a descriptor that a file was written through, and of which nothing is written
// any more. begun: all of it is being written already (sync_file_range(2)). It returns false, and leaves the
// descriptor to the caller, when there are too many; Complete is false from then on.
func (f *Files) Add(fd int, size int64, begun bool) bool {
	if f == nil {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.over && !f.roomForOne() {
		f.drop()
	}
	if f.over {
		return false
	}
	if begun {
		f.begun = append(f.begun, fd)
		return true
	}
	f.rest = append(f.rest, fd)
	page := int64(os.Getpagesize())
	n := (size + page - 1) / page * page
	f.waiting += n
	waiting.Add(n)
	return true
}

// drop keeps nothing any more. mu must be held.
func (f *Files) drop() {
	f.over = true
	f.close()
}

// AddFile is Add for a file of package os that was written. The caller closes it as ever.
func (f *Files) AddFile(file *os.File) error {
	if f == nil {
		return nil
	}
	st, err := file.Stat()
	if err != nil {
		return err
	}
	// The errors that were reported belong to what is behind both (struct file).
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil { // the table of descriptors is full
		f.mu.Lock()
		defer f.mu.Unlock()
		f.drop()
		return nil
	}
	if !f.Add(fd, st.Size(), false) {
		return unix.Close(fd)
	}
	return nil
}

// roomForOne takes the room of one more file, if there is any.
func (f *Files) roomForOne() bool {
	if len(f.begun)+len(f.rest) >= filesOfOne {
		return false
	}
	if room.Add(-1) < 0 {
		room.Add(1)
		return false
	}
	return true
}

// Complete reports whether all files that were added are kept.
func (f *Files) Complete() bool { return f != nil && !f.over }

// Begin has the kernel begin to write the files that were added so far, beside what the caller does
// next. Wait and Sync wait until all are begun, and return its error. Close does not wait for the
// disk: the files are closed when all are begun.
func (f *Files) Begin() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ahead = true
	fds := slices.Clone(f.rest)
	f.beginning.Go(func() {
		if err := each(fds, start); err != nil {
			f.failed.Store(&err)
		}
	})
}

// Busy reports whether others have so much to be written that it takes longer to sync the
// file system than to write these files one by one, which takes more requests. It waits for
// those whose writing was started. What is written to other file systems counts, too: the
// kernel has one number for all (nr_dirty and nr_writeback, proc_vmstat(5)).
func (f *Files) Busy() (bool, error) {
	if err := each(f.begun, wait); err != nil {
		return false, err
	}
	return f.Others(), nil
}

// Others is Busy without the wait: what is being written of these files counts as that of others.
func (f *Files) Others() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return Others(waiting.Load() + int64(len(f.rest))*request)
}

// Others reports whether others have more than a little to be written, when ours are at most so many
// bytes; see [Files.Busy].
func Others(ours int64) bool {
	dirty, err := dirtyBytes()
	return err == nil && dirty > little+ours
}

// Sync makes the files durable, and all names, links, attributes and directories that were made
// on the file system before. An error that is no [Error] means that this cannot be done, and
// that nothing is lost.
//
// The data first, see Wait. Then one fsync of a file that is younger than all that: it
// writes the journal up to there, and flushes the cache of the disk. No manual page
// promises this; the crash tests try it.
func (f *Files) Sync() error {
	if err := f.Wait(); err != nil {
		return err
	}
	return barrier(f.dir)
}

// Wait writes the files, and waits until the disk has them, in its cache. They are durable
// after the next fsync of a file that is made later.
//
// To wait on the descriptor that wrote a file reports every error (sync_file_range(2) with
// all three flags), and ext4 and xfs end the writeback of a page only when their journal has
// the extent (ext4_end_io_end, xfs_end_ioend).
func (f *Files) Wait() error {
	if f == nil {
		return nil
	}
	f.beginning.Wait()
	if err := f.failed.Load(); err != nil {
		return *err
	}
	for _, step := range []struct {
		fds []int
		fn  func(fd int) error
	}{{f.rest, start}, {f.rest, wait}, {f.begun, wait}} {
		if err := each(step.fds, step.fn); err != nil {
			return err
		}
	}
	return nil
}

// Close closes all files. Closing twice is harmless. What was not synced is not lost, but
// its errors are.
func (f *Files) Close() {
	if f == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.close()
}

func (f *Files) close() {
	all := slices.Concat(f.begun, f.rest)
	waiting.Add(-f.waiting)
	f.begun, f.rest, f.waiting = nil, nil, 0
	end := func() {
		f.beginning.Wait()
		for _, fd := range all {
			_ = unix.Close(fd) // reports no error of a write on these file systems
		}
		room.Add(int64(len(all)))
	}
	if f.ahead {
		go end() // containerd may wait for this in its lock, by a Remove that ends an Apply
		return
	}
	end()
}

// start has the kernel begin to write a file.
func start(fd int) error { return syncRange(fd, unix.SYNC_FILE_RANGE_WRITE) }

// wait writes a file, and waits until the disk has it.
func wait(fd int) error {
	return syncRange(fd, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
}

func syncRange(fd, flags int) error {
	if err := unix.SyncFileRange(fd, 0, 0, flags); err != nil {
		path, _ := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
		return &Error{Op: "sync_file_range", Path: path, Err: err}
	}
	return nil
}

// each calls fn for all descriptors, some at a time, and returns an error of one of them.
func each(fds []int, fn func(fd int) error) error {
	var (
		next   atomic.Int64
		failed atomic.Pointer[error]
		all    sync.WaitGroup
	)
	for range min(atOnce, len(fds)) {
		all.Go(func() {
			for failed.Load() == nil {
				i := int(next.Add(1)) - 1
				if i >= len(fds) {
					return
				}
				if err := fn(fds[i]); err != nil {
					failed.CompareAndSwap(nil, &err)
				}
			}
		})
	}
	all.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return nil
}

// barrier syncs a new file without a name in a directory.
func barrier(dir string) error {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "make a file in", Path: dir, Err: err}
	}
	defer unix.Close(fd) // it was synced, or has failed
	if err := unix.Fsync(fd); err != nil {
		return &Error{Op: "fsync", Path: dir, Err: err}
	}
	return nil
}

// dirtyBytes is how much of the page cache is not on its disks.
func dirtyBytes() (int64, error) {
	data, err := os.ReadFile("/proc/vmstat")
	if err != nil {
		return 0, err
	}
	pages, found := int64(0), 0
	for line := range bytes.Lines(data) {
		name, value, _ := strings.Cut(strings.TrimSpace(string(line)), " ")
		if name != "nr_dirty" && name != "nr_writeback" {
			continue
		}
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/vmstat: %w", err)
		}
		pages += n
		found++
	}
	if found != 2 {
		return 0, fmt.Errorf("/proc/vmstat has %d of nr_dirty and nr_writeback", found)
	}
	return pages * int64(os.Getpagesize()), nil
}

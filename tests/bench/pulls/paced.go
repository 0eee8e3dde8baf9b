package pulls

import (
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/blockfile"
)

// serveDisk is the server of a paced disk: a FUSE file system with one file, in front of a file
// of the machine, for a loop device. A request ends when a disk of that speed would have done it.
// The blkio controller could do the same, but its settings outlive the run: they
// stay with a loop device, which the next process gets.
//
// Args are the mount point, the file, bytes a second, and write requests a second.
func serveDisk(args []string) error {
	limits := [2]float64{}
	for i := range limits {
		n, err := strconv.ParseFloat(args[2+i], 64)
		if err != nil {
			return err
		}
		limits[i] = n
	}
	f := &pacedFile{bytes: pace{perSecond: limits[0]}, requests: pace{perSecond: limits[1]}}
	var err error
	if f.direct, err = os.OpenFile(args[1], os.O_RDWR|unix.O_DIRECT, 0); err != nil {
		return err
	}
	if f.plain, err = os.OpenFile(args[1], os.O_RDWR, 0); err != nil {
		return err
	}
	info, err := f.plain.Stat()
	if err != nil {
		return err
	}
	f.size = info.Size()
	// As many requests at a time as a disk takes: the loop device's direct I/O is asynchronous.
	unmount, err := blockfile.Mount(args[0], f, blockfile.Options{Name: "paced-disk", Requests: 64})
	if err != nil {
		return err
	}
	<-ready()
	return unmount()
}

// pacedFile is the disk.
type pacedFile struct {
	direct, plain   *os.File
	size            int64
	bytes, requests pace
	buffers         sync.Pool
}

// pace is a queue in which everybody waits for those before.
type pace struct {
	perSecond float64
	mu        sync.Mutex
	free      time.Time // when all before are done
}

// credit is how long a disk that has had nothing to do may be faster than its limit. It makes up
// for timers that are late.
const credit = 10 * time.Millisecond

// reserve takes a place in the queue, and returns when it ends.
func (p *pace) reserve(amount float64) time.Time {
	if p.perSecond == 0 {
		return time.Time{}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if earliest := time.Now().Add(-credit); p.free.Before(earliest) {
		p.free = earliest
	}
	p.free = p.free.Add(time.Duration(amount / p.perSecond * float64(time.Second)))
	return p.free
}

// do does a request, and returns when its time is over.
func (f *pacedFile) do(requests, size int, request func() error) syscall.Errno {
	until := f.bytes.reserve(float64(size))
	if r := f.requests.reserve(float64(requests)); r.After(until) {
		until = r
	}
	err := request()
	time.Sleep(time.Until(until))
	return syscall.Errno(fuse.ToStatus(err))
}

func (f *pacedFile) buffer() *[]byte {
	if b, ok := f.buffers.Get().(*[]byte); ok {
		return b
	}
	b := aligned(blockfile.MaxRequest)
	return &b
}

// fits reports whether direct I/O can do a request.
func fits(offset int64, size int) bool {
	const sector = 512
	return offset%sector == 0 && size%sector == 0 && size <= blockfile.MaxRequest
}

// Size implements blockfile.Disk.
func (f *pacedFile) Size() int64 { return f.size }

// Read implements blockfile.Disk.
func (f *pacedFile) Read(offset int64, buf []byte) (n int, _ syscall.Errno) {
	errno := f.do(0, len(buf), func() (err error) {
		if !fits(offset, len(buf)) {
			n, err = unix.Pread(int(f.plain.Fd()), buf, offset)
			return err
		}
		b := f.buffer()
		defer f.buffers.Put(b)
		if n, err = unix.Pread(int(f.direct.Fd()), (*b)[:len(buf)], offset); err == nil {
			copy(buf, (*b)[:n])
		}
		return err
	})
	return max(n, 0), errno
}

// Write implements blockfile.Disk.
func (f *pacedFile) Write(offset int64, data []byte) (n int, _ syscall.Errno) {
	errno := f.do(1, len(data), func() (err error) {
		if !fits(offset, len(data)) {
			n, err = unix.Pwrite(int(f.plain.Fd()), data, offset)
			return err
		}
		b := f.buffer()
		defer f.buffers.Put(b)
		n, err = unix.Pwrite(int(f.direct.Fd()), (*b)[:copy(*b, data)], offset)
		return err
	})
	return max(n, 0), errno
}

// Flush implements blockfile.Disk.
func (f *pacedFile) Flush() syscall.Errno {
	return syscall.Errno(fuse.ToStatus(unix.Fdatasync(int(f.plain.Fd()))))
}

// Zero implements blockfile.Disk. Blocks stay allocated.
func (f *pacedFile) Zero(offset, length int64) syscall.Errno {
	return f.do(1, 0, func() error {
		return unix.Fallocate(int(f.plain.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, offset, length)
	})
}

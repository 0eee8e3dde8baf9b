package pulls

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
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
	// As in tests/crash/disk: reclaim that waits for a page of the loop device would wait for us.
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("prctl PR_SET_IO_FLUSHER: %w", err)
	}
	f := &pacedFile{RawFileSystem: fuse.NewDefaultRawFileSystem(), bytes: pace{perSecond: limits[0]}, requests: pace{perSecond: limits[1]}}
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
	server, err := fuse.NewServer(f, args[0], &fuse.MountOptions{
		FsName: "paced-disk", Name: "paced-disk", DirectMountStrict: true, DisableXAttrs: true,
		MaxWrite: maxRequest, // one FUSE request for each request of the block layer
		// As many requests at a time as a disk takes: the loop device's direct I/O is asynchronous.
		MaxBackground: 64, ExtraCapabilities: fuse.CAP_ASYNC_DIO,
	})
	if err != nil {
		return fmt.Errorf("mount %s: %w", args[0], err)
	}
	go server.Serve()
	if err := server.WaitMount(); err != nil {
		return fmt.Errorf("mount %s: %w", args[0], err)
	}
	<-ready()
	return unix.Unmount(args[0], unix.MNT_DETACH)
}

const (
	imageName  = "image"
	maxRequest = 1 << 20
	fileNode   = fuse.FUSE_ROOT_ID + 1
	attrs      = 3600 // seconds: nothing changes behind the kernel's back
)

// pacedFile is the file system.
type pacedFile struct {
	fuse.RawFileSystem
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
func (f *pacedFile) do(requests, size int, request func() error) fuse.Status {
	until := f.bytes.reserve(float64(size))
	if r := f.requests.reserve(float64(requests)); r.After(until) {
		until = r
	}
	err := request()
	time.Sleep(time.Until(until))
	return fuse.ToStatus(err)
}

func (f *pacedFile) buffer() *[]byte {
	if b, ok := f.buffers.Get().(*[]byte); ok {
		return b
	}
	b := aligned(maxRequest)
	return &b
}

// fits reports whether direct I/O can do a request.
func fits(offset uint64, size int) bool {
	const sector = 512
	return offset%sector == 0 && size%sector == 0 && size <= maxRequest
}

func (f *pacedFile) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	buf = buf[:min(int(in.Size), len(buf))]
	n := 0
	status := f.do(0, len(buf), func() (err error) {
		if !fits(in.Offset, len(buf)) {
			n, err = unix.Pread(int(f.plain.Fd()), buf, int64(in.Offset))
			return err
		}
		b := f.buffer()
		defer f.buffers.Put(b)
		if n, err = unix.Pread(int(f.direct.Fd()), (*b)[:len(buf)], int64(in.Offset)); err == nil {
			copy(buf, (*b)[:n])
		}
		return err
	})
	return fuse.ReadResultData(buf[:n]), status
}

func (f *pacedFile) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	n := 0
	status := f.do(1, len(data), func() (err error) {
		if !fits(in.Offset, len(data)) {
			n, err = unix.Pwrite(int(f.plain.Fd()), data, int64(in.Offset))
			return err
		}
		b := f.buffer()
		defer f.buffers.Put(b)
		n, err = unix.Pwrite(int(f.direct.Fd()), (*b)[:copy(*b, data)], int64(in.Offset))
		return err
	})
	return uint32(n), status
}

// Fsync is a flush of the disk's cache.
func (f *pacedFile) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status {
	return fuse.ToStatus(unix.Fdatasync(int(f.plain.Fd())))
}

// Fallocate is what a discard and a write of zeroes become. Blocks stay allocated.
func (f *pacedFile) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if in.Mode&(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_ZERO_RANGE) == 0 {
		return fuse.Status(syscall.EOPNOTSUPP)
	}
	return f.do(1, 0, func() error {
		return unix.Fallocate(int(f.plain.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, int64(in.Offset), int64(in.Length))
	})
}

func (f *pacedFile) String() string { return "paced-disk" }

func (f *pacedFile) attr(node uint64, a *fuse.Attr) fuse.Status {
	*a = fuse.Attr{Ino: node, Nlink: 1, Blksize: 4096}
	switch node {
	case fuse.FUSE_ROOT_ID:
		a.Mode = syscall.S_IFDIR | 0o755
	case fileNode:
		a.Mode, a.Size, a.Blocks = syscall.S_IFREG|0o600, uint64(f.size), uint64(f.size)/512
	default:
		return fuse.ENOENT
	}
	return fuse.OK
}

func (f *pacedFile) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if h.NodeId != fuse.FUSE_ROOT_ID || name != imageName {
		return fuse.ENOENT
	}
	out.NodeId, out.EntryValid, out.AttrValid = fileNode, attrs, attrs
	return f.attr(fileNode, &out.Attr)
}

func (f *pacedFile) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.AttrValid = attrs
	return f.attr(in.NodeId, &out.Attr)
}

// SetAttr accepts changes of times and ignores them; the size is fixed.
func (f *pacedFile) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if size, ok := in.GetSize(); ok && size != uint64(f.size) {
		return fuse.EPERM
	}
	out.AttrValid = attrs
	return f.attr(in.NodeId, &out.Attr)
}

func (f *pacedFile) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.NodeId != fileNode {
		return fuse.EISDIR
	}
	out.OpenFlags = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES
	return fuse.OK
}

func (f *pacedFile) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.OK } // close(2)

func (f *pacedFile) Release(<-chan struct{}, *fuse.ReleaseIn) {}

func (f *pacedFile) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.OK }

func (f *pacedFile) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.Bsize, out.NameLen, out.Blocks = 4096, 255, uint64(f.size)/4096
	return fuse.OK
}

// Package blockfile serves a disk as the one file of a FUSE file system, for a loop device in
// front of it. It implements the wire protocol of FUSE: the node and path layers above it would
// only add ways to reorder requests.
package blockfile

import (
	"errors"
	"fmt"
	"os/signal"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Name is that of the file, below the mount point.
const Name = "image"

// MaxRequest is the most bytes of one read or write.
const MaxRequest = 1 << 20

// Disk does what requests of the loop device ask for. Calls come side by side.
type Disk interface {
	Size() int64
	Read(offset int64, buf []byte) (int, syscall.Errno)
	Write(offset int64, data []byte) (int, syscall.Errno)
	Flush() syscall.Errno
	// Zero is what a discard and a write of zeroes become. A disk that returns anything
	// else after a discard is legal, but no file system reads what it has discarded.
	Zero(offset, length int64) syscall.Errno
}

// Options of a mount.
type Options struct {
	Name string // of the file system, in the list of mounts
	// Requests is how many requests are served at a time; 0 is the default of FUSE, and writes
	// are served one after another then.
	Requests int
}

// Mount mounts the file system. It is served in the background until unmount is called. When the
// process ends before, the mount stays and fails each request: the process ignores the signals
// that a whole group gets, as for Ctrl-C, and must notice the end of the one that has started it.
func Mount(dir string, d Disk, o Options) (unmount func() error, err error) {
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM)
	// Reclaim that waits for a page of the loop device would wait for us; with
	// this flag our own allocations never start such a wait (Linux 5.6). A
	// container may lack CAP_SYS_RESOURCE for it; then only a machine that runs
	// out of memory can get there, and a test on it fails by its time-out.
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil && !errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("prctl PR_SET_IO_FLUSHER: %w", err)
	}
	// Direct: one FUSE request for each request of the loop device. Without
	// FOPEN_PARALLEL_DIRECT_WRITES the kernel serializes them.
	f := &oneFile{RawFileSystem: fuse.NewDefaultRawFileSystem(), disk: d, name: o.Name, flags: fuse.FOPEN_DIRECT_IO}
	m := &fuse.MountOptions{FsName: o.Name, Name: o.Name, DirectMountStrict: true, DisableXAttrs: true, MaxWrite: MaxRequest}
	if o.Requests > 0 {
		f.flags |= fuse.FOPEN_PARALLEL_DIRECT_WRITES
		m.MaxBackground, m.ExtraCapabilities = o.Requests, fuse.CAP_ASYNC_DIO
	}
	server, err := fuse.NewServer(f, dir, m)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", dir, err)
	}
	go server.Serve()
	if err := server.WaitMount(); err != nil {
		return nil, fmt.Errorf("mount %s: %w", dir, err)
	}
	return func() error { return unix.Unmount(dir, unix.MNT_DETACH) }, nil
}

type oneFile struct {
	fuse.RawFileSystem
	disk  Disk
	name  string
	flags uint32
}

const (
	rootNode = fuse.FUSE_ROOT_ID
	fileNode = rootNode + 1

	// Nothing changes behind the kernel's back, so it need not query again.
	attrSeconds = 3600
)

func (f *oneFile) String() string { return f.name }

func (f *oneFile) attr(node uint64, a *fuse.Attr) fuse.Status {
	*a = fuse.Attr{Ino: node, Nlink: 1, Blksize: 4096}
	switch node {
	case rootNode:
		a.Mode = syscall.S_IFDIR | 0o755
	case fileNode:
		a.Mode = syscall.S_IFREG | 0o600
		a.Size = uint64(f.disk.Size())
		a.Blocks = a.Size / 512
	default:
		return fuse.ENOENT
	}
	return fuse.OK
}

func (f *oneFile) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if h.NodeId != rootNode || name != Name {
		return fuse.ENOENT
	}
	out.NodeId, out.EntryValid, out.AttrValid = fileNode, attrSeconds, attrSeconds
	return f.attr(fileNode, &out.Attr)
}

func (f *oneFile) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.AttrValid = attrSeconds
	return f.attr(in.NodeId, &out.Attr)
}

// SetAttr accepts changes of times and ignores them; the size is fixed.
func (f *oneFile) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if size, ok := in.GetSize(); ok && size != uint64(f.disk.Size()) {
		return fuse.EPERM
	}
	out.AttrValid = attrSeconds
	return f.attr(in.NodeId, &out.Attr)
}

func (f *oneFile) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.NodeId != fileNode {
		return fuse.EISDIR
	}
	out.OpenFlags = f.flags
	return fuse.OK
}

func (f *oneFile) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n, errno := f.disk.Read(int64(in.Offset), buf[:min(int(in.Size), len(buf))])
	return fuse.ReadResultData(buf[:n]), fuse.Status(errno)
}

func (f *oneFile) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	n, errno := f.disk.Write(int64(in.Offset), data)
	return uint32(n), fuse.Status(errno)
}

// Fsync is a flush of the disk's cache.
func (f *oneFile) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status {
	return fuse.Status(f.disk.Flush())
}

func (f *oneFile) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	const known = unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_ZERO_RANGE
	if in.Mode&^known != 0 || in.Mode&(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_ZERO_RANGE) == 0 {
		return fuse.Status(syscall.EOPNOTSUPP)
	}
	return fuse.Status(f.disk.Zero(int64(in.Offset), int64(in.Length)))
}

// Flush is close(2), not a flush of the disk.
func (f *oneFile) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.OK }

func (f *oneFile) Release(<-chan struct{}, *fuse.ReleaseIn) {}

func (f *oneFile) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.OK }

func (f *oneFile) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.Bsize, out.NameLen = 4096, 255
	out.Blocks = uint64(f.disk.Size()) / 4096
	return fuse.OK
}

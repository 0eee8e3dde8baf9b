package disk

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	envDir      = "RECORDING_DISK_DIR" // set in the environment of the server
	imageName   = "image"              // of the only file
	mountName   = "fuse"               // directory of the mount, below the disk's
	controlName = "control.sock"

	fdImage = 3 // inherited: the memfd
	fdAlive = 4 // inherited: read end of a pipe that closes with the test process
)

// Init turns a process that Start has started into the server, and does not
// return then. In every other process it does nothing. Call it first in main or
// TestMain.
func Init() {
	dir := os.Getenv(envDir)
	if dir == "" {
		return
	}
	if err := serve(dir); err != nil {
		fmt.Fprintf(os.Stderr, "recording disk: %v\n", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func serve(dir string) error {
	// Reclaim that waits for a page of the loop device would wait for us; with
	// this flag our own allocations never start such a wait (Linux 5.6). A
	// container may lack CAP_SYS_RESOURCE for it; then only a machine that runs
	// out of memory can get there, and a test on it fails by its time-out.
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("prctl PR_SET_IO_FLUSHER: %w", err)
	}
	image, err := mapImage(fdImage)
	if err != nil {
		return err
	}
	rec := &recorder{image: image, limit: logLimit}

	mountpoint := filepath.Join(dir, mountName)
	fs := &oneFile{RawFileSystem: fuse.NewDefaultRawFileSystem(), rec: rec}
	server, err := fuse.NewServer(fs, mountpoint, &fuse.MountOptions{
		FsName:            "recording-disk",
		Name:              "recording-disk",
		DirectMountStrict: true,
		DisableXAttrs:     true,
		MaxWrite:          1 << 20, // one FUSE request for each request of the block layer
	})
	if err != nil {
		return fmt.Errorf("mount %s: %w", mountpoint, err)
	}
	go server.Serve()
	if err := server.WaitMount(); err != nil {
		return fmt.Errorf("mount %s: %w", mountpoint, err)
	}

	socket, err := net.Listen("unix", filepath.Join(dir, controlName))
	if err != nil {
		return err
	}
	go acceptControl(socket, rec)

	// The test process waits for this line.
	if _, err := fmt.Println("ready"); err != nil {
		return err
	}
	// Its end of the pipe is never written to: reading returns when it dies or
	// closes the disk.
	_, _ = io.Copy(io.Discard, os.NewFile(fdAlive, "alive"))
	_ = unix.Unmount(mountpoint, unix.MNT_DETACH)
	return nil
}

func mapImage(fd int) ([]byte, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat image: %w", err)
	}
	image, err := unix.Mmap(fd, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map image of %d bytes: %w", st.Size, err)
	}
	return image, nil
}

// oneFile is a file system with one file, the disk. It implements the wire protocol
// of FUSE: the node and path layers above it would only add ways to reorder.
type oneFile struct {
	fuse.RawFileSystem
	rec *recorder
}

const (
	rootNode = fuse.FUSE_ROOT_ID
	fileNode = rootNode + 1

	// Nothing changes behind the kernel's back, so it need not query again.
	attrSeconds = 3600
)

func (f *oneFile) String() string { return "recording-disk" }

func (f *oneFile) attr(node uint64, a *fuse.Attr) fuse.Status {
	*a = fuse.Attr{Ino: node, Nlink: 1, Blksize: 4096}
	switch node {
	case rootNode:
		a.Mode = syscall.S_IFDIR | 0o755
	case fileNode:
		a.Mode = syscall.S_IFREG | 0o600
		a.Size = uint64(len(f.rec.image))
		a.Blocks = a.Size / 512
	default:
		return fuse.ENOENT
	}
	return fuse.OK
}

func (f *oneFile) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if h.NodeId != rootNode || name != imageName {
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
	if size, ok := in.GetSize(); ok && size != uint64(len(f.rec.image)) {
		return fuse.EPERM
	}
	out.AttrValid = attrSeconds
	return f.attr(in.NodeId, &out.Attr)
}

func (f *oneFile) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.NodeId != fileNode {
		return fuse.EISDIR
	}
	// Direct: one FUSE request for each request of the loop device. Without
	// FOPEN_PARALLEL_DIRECT_WRITES the kernel serialises them.
	out.OpenFlags = fuse.FOPEN_DIRECT_IO
	return fuse.OK
}

func (f *oneFile) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n, errno := f.rec.read(int64(in.Offset), buf[:min(int(in.Size), len(buf))])
	return fuse.ReadResultData(buf[:n]), fuse.Status(errno)
}

func (f *oneFile) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	n, errno := f.rec.write(int64(in.Offset), data)
	return uint32(n), fuse.Status(errno)
}

func (f *oneFile) Fsync(<-chan struct{}, *fuse.FsyncIn) fuse.Status {
	return fuse.Status(f.rec.flush())
}

// Fallocate is what a discard and a write of zeroes become. Both end as zeroes
// here: a disk that returns anything else after a discard is legal, but no file
// system reads what it has discarded.
func (f *oneFile) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	const known = unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_ZERO_RANGE
	if in.Mode&^known != 0 || in.Mode&(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_ZERO_RANGE) == 0 {
		return fuse.Status(syscall.EOPNOTSUPP)
	}
	return fuse.Status(f.rec.discard(int64(in.Offset), int64(in.Length)))
}

// Flush is close(2), not a flush of the disk.
func (f *oneFile) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.OK }

func (f *oneFile) Release(<-chan struct{}, *fuse.ReleaseIn) {}

func (f *oneFile) Access(<-chan struct{}, *fuse.AccessIn) fuse.Status { return fuse.OK }

func (f *oneFile) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.Bsize, out.NameLen = 4096, 255
	out.Blocks = uint64(len(f.rec.image)) / 4096
	return fuse.OK
}

package disk

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// loop is an attached loop device.
type loop struct {
	path   string
	device *os.File
}

// attach gives a file a loop device, which does requests to it one after another, or side by
// side. LO_FLAGS_AUTOCLEAR with the descriptor
// kept open: the device goes when the descriptor and the last mount are gone,
// also when this process is killed.
func attach(path string, queued bool) (*loop, error) {
	backing, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer backing.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()

	config := unix.LoopConfig{Fd: uint32(backing.Fd()), Size: SectorSize}
	config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
	if queued {
		// Direct I/O is asynchronous.
		config.Info.Flags |= unix.LO_FLAGS_DIRECT_IO
	}
	copy(config.Info.File_name[:], "recording-disk")
	deadline := time.Now().Add(30 * time.Second)
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		l := &loop{path: fmt.Sprintf("/dev/loop%d", n)}
		if l.device, err = openNode(l.path, n); err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(l.device.Fd()), &config)
		if err == nil {
			return l, nil
		}
		l.device.Close()
		// Between the two calls another process may have taken the device.
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return nil, fmt.Errorf("attach %s to %s: %w", path, l.path, err)
		}
	}
}

// openNode opens a loop device, and makes its node where no devtmpfs does.
func openNode(path string, n int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if !errors.Is(err, os.ErrNotExist) {
		return f, err
	}
	const loopMajor = 7
	if err := unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(loopMajor, uint32(n)))); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("mknod %s: %w", path, err)
	}
	return os.OpenFile(path, os.O_RDWR, 0)
}

func (l *loop) detach() error {
	err := unix.IoctlSetInt(int(l.device.Fd()), unix.LOOP_CLR_FD, 0)
	if err != nil {
		err = fmt.Errorf("detach %s: %w", l.path, err)
	}
	return errors.Join(err, l.device.Close())
}

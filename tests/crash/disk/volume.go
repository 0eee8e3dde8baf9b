package disk

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Volume is memory with a loop device on it: what a Disk and a Plain have in
// common.
type Volume struct {
	memory *os.File
	image  []byte // the memory, mapped
	loop   *loop
	mounts []string
}

// Device returns the path of the loop device.
func (v *Volume) Device() string { return v.loop.path }

// Image returns the memory of the disk. What is written to it is what the loop
// device reads from then on; use it only while nothing is mounted, and call
// DropCache after.
func (v *Volume) Image() []byte { return v.image }

// DropCache makes the loop device forget what it has read: otherwise the next
// mount would see the previous image.
func (v *Volume) DropCache() error {
	if err := unix.IoctlSetInt(int(v.loop.device.Fd()), unix.BLKFLSBUF, 0); err != nil {
		return fmt.Errorf("drop cache of %s: %w", v.loop.path, err)
	}
	return nil
}

// Clear makes a part of the image, whole pages, zero and gives its memory back. The
// rules are those of Image.
func (v *Volume) Clear(r Range) error {
	if r.Length == 0 {
		return nil
	}
	if err := unix.Madvise(v.image[r.Offset:r.Offset+r.Length], unix.MADV_REMOVE); err != nil {
		return fmt.Errorf("clear disk: %w", err)
	}
	return nil
}

// InMemory lists the parts of the image, whole pages, that memory is behind. All
// others have never been written to, or were discarded, and are zero; to read them
// in Image takes memory.
func (v *Volume) InMemory() ([]Range, error) {
	var out []Range
	for at, size := int64(0), int64(len(v.image)); at < size; {
		from, err := unix.Seek(int(v.memory.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("memory of disk: seek: %w", err)
		}
		to, err := unix.Seek(int(v.memory.Fd()), from, unix.SEEK_HOLE)
		if err != nil {
			return nil, fmt.Errorf("memory of disk: seek: %w", err)
		}
		out = append(out, Range{from, to - from})
		at = to
	}
	return out, nil
}

// allocate makes the memory, all zero.
func (v *Volume) allocate(name string, size int64) error {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("memfd: %w", err)
	}
	v.memory = os.NewFile(uintptr(fd), name)
	if err := v.memory.Truncate(size); err != nil {
		return err
	}
	v.image, err = mapImage(fd)
	return err
}

// free gives the memory back.
func (v *Volume) free() error {
	var errs []error
	if v.image != nil {
		errs = append(errs, unix.Munmap(v.image))
		v.image = nil
	}
	if v.memory != nil {
		errs = append(errs, v.memory.Close())
		v.memory = nil
	}
	return errors.Join(errs...)
}

// Plain is a disk that records nothing: a loop device directly on memory, for
// examining states. A request costs a third of what it costs a Disk.
type Plain struct{ Volume }

// StartPlain makes an empty disk of the given size, a multiple of 4096.
func StartPlain(size int64) (_ *Plain, err error) {
	if size <= 0 || size%4096 != 0 {
		return nil, fmt.Errorf("start plain disk: size %d is not a multiple of 4096", size)
	}
	d := &Plain{}
	defer func() {
		if err != nil {
			err = fmt.Errorf("start plain disk: %w", err)
			_ = d.Close()
		}
	}()
	if err = d.allocate("plain-disk", size); err != nil {
		return d, err
	}
	d.loop, err = attach(fmt.Sprintf("/proc/self/fd/%d", d.memory.Fd()), false)
	return d, err
}

// Watch has nothing to do: see Touched.
func (d *Plain) Watch() error { return nil }

// Touched returns the places behind which there is memory: all that were written to,
// but for those that were discarded since, which are zero.
func (d *Plain) Touched() ([]Range, error) { return d.InMemory() }

// Abandon gives up a disk that cannot be unmounted because this very process
// holds something on it. Loop device and memory go when the process ends.
func (d *Plain) Abandon() error {
	for len(d.mounts) > 0 {
		dir := d.mounts[len(d.mounts)-1]
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("abandon %s: %w", dir, err)
		}
		d.mounts = d.mounts[:len(d.mounts)-1]
	}
	return d.Close()
}

// Close unmounts what Mount has mounted and gives the loop device and the
// memory back. It can be called more than once.
func (d *Plain) Close() error {
	if err := d.Unmount(); err != nil {
		return fmt.Errorf("close plain disk: %w", err)
	}
	if d.loop != nil {
		if err := d.loop.detach(); err != nil {
			return fmt.Errorf("close plain disk: %w", err)
		}
		d.loop = nil
	}
	if err := d.free(); err != nil {
		return fmt.Errorf("close plain disk: %w", err)
	}
	return nil
}

package kit

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// DiskOptions describe a scratch disk.
type DiskOptions struct {
	FS    string   // ext4, xfs or btrfs
	Size  int64    // of the sparse backing file; 4 GiB when zero
	Mkfs  []string // further arguments to mkfs
	Mount string   // mount options, comma separated, as for mount -o

	// Image is a file that is there already, of the size that it is to have, in place of the
	// backing file. It stays.
	Image string
	// Made: there is a file system in Image, which is mounted as it is.
	Made bool
	// Direct is for measurements: the loop device uses direct I/O. Otherwise each page is in
	// memory a second time, as one of the backing file, and a write to the device ends before
	// the machine's disk has seen it.
	Direct bool
}

// Disk is a file system on a loop device on a sparse file.
type Disk struct {
	dir   string // holds the image and the mount point
	opts  DiskOptions
	loop  *os.File
	mount bool
	down  bool // shut down since it was mounted
}

// NewDisk makes the file system under dir and mounts it.
func NewDisk(dir string, opts DiskOptions) (_ *Disk, err error) {
	if opts.Size == 0 {
		opts.Size = 4 << 30
	}
	d := &Disk{dir: dir, opts: opts}
	if err := os.MkdirAll(d.Path(), 0o755); err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	image, flags := opts.Image, os.O_RDWR
	if image == "" {
		image, flags = filepath.Join(dir, "disk.img"), os.O_RDWR|os.O_CREATE|os.O_EXCL
	}
	f, err := os.OpenFile(image, flags, 0o600)
	if err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if opts.Image == "" {
		if err := f.Truncate(opts.Size); err != nil {
			return nil, fmt.Errorf("disk: %w", err)
		}
	}
	if !opts.Made {
		if err := mkfs(image, opts); err != nil {
			return nil, err
		}
	}
	if d.loop, err = attachLoop(f, opts.Direct); err != nil {
		return nil, fmt.Errorf("disk %s: %w", image, err)
	}
	if err := d.Mount(); err != nil {
		return nil, errors.Join(err, d.loop.Close())
	}
	return d, nil
}

// mkfsArgs keeps mkfs from leaving work to the kernel: a lazily initialised
// ext4 writes in the background for minutes, which blurs every measurement.
var mkfsArgs = map[string][]string{
	"ext4":  {"-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"},
	"xfs":   {"-q", "-f"},
	"btrfs": {"-q", "-f"},
}

func mkfs(image string, opts DiskOptions) error {
	args, ok := mkfsArgs[opts.FS]
	if !ok {
		return fmt.Errorf("disk: unknown file system %q", opts.FS)
	}
	args = append(append(append([]string(nil), args...), opts.Mkfs...), image)
	out, err := exec.Command("mkfs."+opts.FS, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mkfs.%s %s: %w: %s", opts.FS, strings.Join(args, " "), err, out)
	}
	return nil
}

// attachLoop binds f to a free loop device. The device frees itself when the
// last user, this descriptor or a mount, lets go: so no exit path can leak it.
func attachLoop(f *os.File, direct bool) (*os.File, error) {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer ctl.Close()
	config := unix.LoopConfig{Fd: uint32(f.Fd())}
	config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
	if direct {
		config.Info.Flags |= unix.LO_FLAGS_DIRECT_IO
	}
	copy(config.Info.File_name[:], f.Name())
	// Another process may take the free device between the two calls.
	deadline := time.Now().Add(10 * time.Second)
	for {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		dev, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &config)
		if err == nil {
			return dev, nil
		}
		dev.Close()
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return nil, fmt.Errorf("configure %s: %w", dev.Name(), err)
		}
	}
}

// Path joins names to the mount point.
func (d *Disk) Path(names ...string) string {
	return filepath.Join(append([]string{d.dir, "mnt"}, names...)...)
}

// Device is the loop device, such as /dev/loop0.
func (d *Disk) Device() string { return d.loop.Name() }

// Mount mounts the disk with the options it was made with.
func (d *Disk) Mount() error { return d.MountWith(d.opts.Mount) }

// MountWith mounts the disk with other options, such as "ro".
func (d *Disk) MountWith(options string) error {
	if err := Private(); err != nil {
		return err
	}
	args := []string{"-t", d.opts.FS}
	if options != "" {
		args = append(args, "-o", options)
	}
	args = append(args, d.Device(), d.Path())
	if out, err := exec.Command("mount", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("mount %s: %w: %s", strings.Join(args, " "), err, out)
	}
	d.mount, d.down = true, false
	return nil
}

// Shutdown cuts the power: from now on the file system writes nothing more, not
// even its journal. What already reached the block layer stays. ext4 and xfs
// can do it; btrfs cannot (ENOTTY on Linux 6.18). Doing it twice is no error.
func (d *Disk) Shutdown() error {
	if d.down {
		return nil
	}
	const (
		fsIocShutdown = 0x8004587d // _IOR('X', 125, __u32)
		noLogFlush    = 2
	)
	f, err := os.Open(d.Path())
	if err != nil {
		return fmt.Errorf("shut down %s: %w", d.Path(), err)
	}
	defer f.Close()
	if err := unix.IoctlSetPointerInt(int(f.Fd()), fsIocShutdown, noLogFlush); err != nil {
		return fmt.Errorf("shut down %s: %w", d.Path(), err)
	}
	d.down = true
	return nil
}

// Unmount unmounts the disk and everything mounted below it, and waits until the
// kernel has released it. It fails while a process still uses a mount: a lazy
// unmount would hide that.
func (d *Disk) Unmount() error {
	if !d.mount {
		return nil
	}
	if err := UnmountBelow(d.Path()); err != nil {
		return err
	}
	d.mount = false
	return WaitReleased(d.Device(), slow)
}

// Remount unmounts and mounts again, which after Shutdown replays the journal
// as a boot would.
func (d *Disk) Remount() error {
	if err := d.Unmount(); err != nil {
		return err
	}
	return d.Mount()
}

// Cold remounts the disk, and leaves nothing of any disk in memory.
func (d *Disk) Cold() error {
	if err := d.Remount(); err != nil {
		return err
	}
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

// Sync writes everything that the file system has in memory.
func (d *Disk) Sync() error {
	f, err := os.Open(d.Path())
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
}

// Close unmounts the disk, frees the loop device and removes the image.
func (d *Disk) Close() error {
	if err := d.Unmount(); err != nil {
		return err
	}
	err := d.loop.Close()
	if d.opts.Image == "" {
		err = errors.Join(err, os.Remove(filepath.Join(d.dir, "disk.img")))
	}
	return err
}

// UnmountBelow unmounts top and all mounts under it, innermost first. Processes
// that were just killed let go of a mount a moment later, so EBUSY is given time.
func UnmountBelow(top string) error {
	deadline := time.Now().Add(slow)
	for {
		points, err := mountsBelow(top)
		if err != nil {
			return err
		}
		if len(points) == 0 {
			return nil
		}
		last := points[len(points)-1]
		err = unix.Unmount(last, unix.UMOUNT_NOFOLLOW)
		if err == nil || errors.Is(err, unix.EINVAL) {
			continue
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("unmount %s: %w", last, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// WaitReleased waits until no file system holds a block device. A mount
// namespace that was copied a moment before the unmount, as every runtime does
// when it starts a container, keeps the file system alive: mounting the device
// again would bring back the same one, shut down and with its page cache.
func WaitReleased(device string, limit time.Duration) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		// For a block device O_EXCL means: not while a file system holds it (open(2)).
		fd, err := unix.Open(device, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err == nil {
			return unix.Close(fd)
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("wait for %s to be released: %w", device, err)
		}
	}
}

// mountsBelow lists the mount points at and under top in the order of mounting.
func mountsBelow(top string) ([]string, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var points []string
	for line := range strings.Lines(string(info)) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		point := unescape.Replace(fields[4])
		if point == top || strings.HasPrefix(point, top+"/") {
			points = append(points, point)
		}
	}
	return points, nil
}

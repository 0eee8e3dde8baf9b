package pulls

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/blockfile"
)

// Limit is what a disk can do in a second; 0 is no limit.
type Limit struct {
	Bytes    int64 // read and written
	Requests int64 // of writes
}

// Disks are the kinds of disks: that of the machine, one of a usual cloud volume, and one as
// boards have it.
var Disks = map[string]Limit{
	"fast": {},
	"250":  {Bytes: 250e6},
	"emmc": {Bytes: 40e6, Requests: 1000},
}

// machineDisk is the disk of one variant.
type machineDisk struct {
	*kit.Disk
	dir   string // of everything
	paced *Paced // the file that is its device; nil if it has no limit
}

// newDisk makes a disk with a file system, below dir. Its file is written before, and nothing is
// discarded: to write to a block for the first time costs the machine's file system a transaction,
// which the variants would pay for at different times.
func newDisk(dir, fs, kind string, size int64) (_ *machineDisk, err error) {
	d := &machineDisk{dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Close())
		}
	}()
	o := kit.DiskOptions{FS: fs, Size: size, Mkfs: []string{"-K"}, Image: filepath.Join(dir, "file"), Direct: true}
	if fs == "btrfs" {
		o.Mount = "nodiscard"
	}
	if err := fill(o.Image, size); err != nil {
		return nil, err
	}
	if Disks[kind] != (Limit{}) {
		if d.paced, err = Pace(o.Image, filepath.Join(dir, "paced"), kind); err != nil {
			return nil, err
		}
		o.Image = d.paced.File
	}
	d.Disk, err = kit.NewDisk(filepath.Join(dir, "disk"), o)
	return d, err
}

// Paced is a file that is as slow as a disk of a kind.
type Paced struct {
	File   string
	server *child
}

// Pace serves a file at a kind's speed, on a directory that it makes. The program must call Init.
func Pace(file, dir, kind string) (*Paced, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	limit := Disks[kind]
	server, err := startChild("disk", dir, file, strconv.FormatInt(limit.Bytes, 10), strconv.FormatInt(limit.Requests, 10))
	if err != nil {
		return nil, err
	}
	return &Paced{filepath.Join(dir, blockfile.Name), server}, nil
}

// End ends it, when nothing uses the file any more.
func (p *Paced) End() error { return p.server.end(nil) }

// fill makes a file of zeroes, all of them written.
func fill(file string, size int64) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_RDWR|unix.O_DIRECT, 0o600)
	if err != nil {
		return err
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, size) // in one piece, if that is possible
	zeroes := aligned(4 << 20)
	for at := int64(0); at < size && err == nil; at += int64(len(zeroes)) {
		_, err = f.WriteAt(zeroes[:min(int64(len(zeroes)), size-at)], at)
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("fill %s: %w", file, err)
	}
	return nil
}

// Close gives the disk back. It can be called on one that is half made.
func (d *machineDisk) Close() error {
	var errs []error
	if d.Disk != nil {
		errs = append(errs, d.Disk.Close())
	}
	if d.paced != nil {
		errs = append(errs, d.paced.End())
	}
	return errors.Join(append(errs, os.RemoveAll(d.dir))...)
}

// proofTime is how long each half of a proof takes. That of a disk without a limit is a figure
// for the report, and proves nothing.
func proofTime(limit Limit) time.Duration {
	if limit == (Limit{}) {
		return 300 * time.Millisecond
	}
	return time.Second
}

// prove measures what a disk can do, and fails when it is not what its limit demands: more than
// a tenth above it, or less than half of it.
func (d *machineDisk) prove(kind string) (p Proof, err error) {
	name := d.Path("proof")
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR|unix.O_DIRECT, 0o600)
	if err != nil {
		return p, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(name), d.Sync()) }()
	const large, small, most = 1 << 20, 4096, 64
	if err := unix.Fallocate(int(f.Fd()), 0, 0, most*large); err != nil { // a file that grows has one writer at a time
		return p, err
	}
	limit := proofTime(Disks[kind])
	var n atomic.Int64
	start := time.Now()
	err = writers(limit, large, func(page []byte) error {
		at := n.Add(1) - 1
		_, err := f.WriteAt(page, at%most*large)
		return err
	})
	if err = errors.Join(err, f.Sync()); err != nil {
		return p, err
	}
	p.Bytes = float64(n.Load()) * large / time.Since(start).Seconds()
	written := min(n.Load(), most) * large

	n.Store(0)
	start = time.Now()
	err = writers(limit, small, func(page []byte) error {
		n.Add(1)
		_, err := f.WriteAt(page, rand.Int64N(written/small)*small)
		return err
	})
	p.Requests = float64(n.Load()) / time.Since(start).Seconds()
	if err != nil {
		return p, err
	}
	return p, p.check(Disks[kind])
}

// writers calls write in four threads, each with memory of its own, for so long.
func writers(limit time.Duration, size int, write func(page []byte) error) error {
	var running sync.WaitGroup
	errs := make([]error, 4)
	start := time.Now()
	for i := range errs {
		running.Go(func() {
			page := aligned(size)
			for time.Since(start) < limit && errs[i] == nil {
				errs[i] = write(page)
			}
		})
	}
	running.Wait()
	return errors.Join(errs...)
}

func (p Proof) check(limit Limit) error {
	for what, v := range map[string][2]float64{
		"bytes written":  {p.Bytes, float64(limit.Bytes)},
		"write requests": {p.Requests, float64(limit.Requests)},
	} {
		if have, want := v[0], v[1]; want > 0 && (have > want*1.1 || have < want/2) {
			return fmt.Errorf("the disk is not as slow, or as fast, as it is to be: %.0f %s in a second, the limit is %.0f", have, what, want)
		}
	}
	return nil
}

// aligned is memory for direct I/O.
func aligned(size int) []byte {
	const page = 4096
	b := make([]byte, size+page)
	skip := page - int(uintptr(unsafe.Pointer(&b[0]))%page)
	return b[skip : skip+size]
}

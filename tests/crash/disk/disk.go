package disk

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/blockfile"
)

// logLimit bounds the data that a log may hold. A workload that writes more gets
// an error from Mark and in Stats.Overflow; it is never cut silently.
const logLimit = 4 << 30

// Disk is a recording disk: the server process, its image, and the loop device.
type Disk struct {
	*Control
	Volume // shared with the server

	dir    string // private temporary directory: FUSE mount and control socket
	server *exec.Cmd
	alive  *os.File // write end of the pipe that keeps the server alive
	stderr bytes.Buffer
}

// Start makes an empty disk of the given size, a multiple of 4096, and attaches
// a loop device to it. The disk records from the beginning. It does one request after
// another.
func Start(size int64) (*Disk, error) { return newDisk(size, 0) }

// queue is how many requests a disk with a queue does at a time.
const queue = 32

// StartQueued is Start for a disk that does several requests at a time: one that a Fault
// stalls is overtaken by those that came later, flushes among them.
func StartQueued(size int64) (*Disk, error) { return newDisk(size, queue) }

func newDisk(size int64, requests int) (_ *Disk, err error) {
	if size <= 0 || size%4096 != 0 {
		return nil, fmt.Errorf("start disk: size %d is not a multiple of 4096", size)
	}
	d := &Disk{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start disk: %w", err), d.Close())
		}
	}()
	// The path of a unix socket has at most 107 bytes: not below a test's
	// directory, whose name may be longer.
	if d.dir, err = os.MkdirTemp("", "recdisk"); err != nil {
		return d, err
	}
	if err = os.Mkdir(filepath.Join(d.dir, mountName), 0o700); err != nil {
		return d, err
	}
	if err = d.startServer(size, requests); err != nil {
		return d, err
	}
	if d.Control, err = Dial(d.Socket()); err != nil {
		return d, err
	}
	if d.loop, err = attach(filepath.Join(d.dir, mountName, blockfile.Name), requests > 0); err != nil {
		return d, err
	}
	return d, nil
}

// startServer starts this binary again; Init takes over there.
func (d *Disk) startServer(size int64, requests int) error {
	if err := d.allocate("recording-disk", size); err != nil {
		return err
	}
	alive, keep, err := os.Pipe()
	if err != nil {
		return err
	}
	defer alive.Close()
	d.alive = keep

	d.server = exec.Command("/proc/self/exe")
	d.server.Args[0] = "recording-disk"
	d.server.Env = append(os.Environ(), envDir+"="+d.dir, envRequests+"="+strconv.Itoa(requests))
	d.server.Dir = "/" // never the file system under test
	d.server.ExtraFiles = []*os.File{d.memory, alive}
	d.server.Stderr = &d.stderr
	stdout, err := d.server.StdoutPipe()
	if err != nil {
		return err
	}
	if err := d.server.Start(); err != nil {
		d.server = nil
		return err
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if line == "ready\n" {
		return nil
	}
	// A program without Init runs its own main here. Wait would need the
	// output to end, which it does when the process is gone.
	_ = d.server.Process.Kill()
	_, _ = io.Copy(io.Discard, stdout)
	werr := d.server.Wait()
	d.server = nil
	return fmt.Errorf("server printed %q, not ready (does main call disk.Init first?): %v, %v: %s", strings.TrimSpace(line), err, werr, d.stderr.String())
}

// Socket returns the path of the control socket.
func (d *Disk) Socket() string { return filepath.Join(d.dir, controlName) }

// Kill ends the server as a crash would: from then on every request to the disk
// fails.
func (d *Disk) Kill() error {
	if d.server == nil {
		return nil
	}
	err := d.server.Process.Kill()
	_ = d.server.Wait()
	d.server = nil
	return err
}

// Close unmounts what Mount has mounted, detaches the loop device and ends the
// server. It can be called more than once.
func (d *Disk) Close() error {
	var errs []error
	errs = append(errs, d.Unmount())
	if d.loop != nil {
		errs = append(errs, d.loop.detach())
		d.loop = nil
	}
	if d.Control != nil {
		errs = append(errs, d.Hangup())
		d.Control = nil
	}
	if d.alive != nil {
		errs = append(errs, d.alive.Close())
		d.alive = nil
	}
	if d.server != nil {
		// It unmounts the FUSE file system and ends. When something still holds
		// that, killing it fails every request, and every process that waits goes on.
		timer := time.AfterFunc(30*time.Second, func() { _ = d.server.Process.Kill() })
		if err := d.server.Wait(); err != nil {
			errs = append(errs, fmt.Errorf("server: %w: %s", err, d.stderr.String()))
		}
		timer.Stop()
		d.server = nil
	}
	errs = append(errs, d.free())
	if d.dir != "" {
		_ = unix.Unmount(filepath.Join(d.dir, mountName), unix.MNT_DETACH) // when the server was killed
		errs = append(errs, os.RemoveAll(d.dir))
		d.dir = ""
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close disk: %w", err)
	}
	return nil
}

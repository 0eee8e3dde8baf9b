package disk

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/blockfile"
)

const (
	envDir      = "RECORDING_DISK_DIR" // set in the environment of the server
	envRequests = "RECORDING_DISK_REQUESTS"
	mountName   = "fuse" // directory of the mount, below the disk's
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
	image, err := mapImage(fdImage)
	if err != nil {
		return err
	}
	rec := &recorder{image: image, limit: logLimit}
	requests, err := strconv.Atoi(os.Getenv(envRequests))
	if err != nil {
		return fmt.Errorf("%s: %w", envRequests, err)
	}

	mountpoint := filepath.Join(dir, mountName)
	unmount, err := blockfile.Mount(mountpoint, rec, blockfile.Options{Name: "recording-disk", Requests: requests})
	if err != nil {
		return err
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
	_ = unmount()
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

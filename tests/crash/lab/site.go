package lab

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// site is where something is recorded: a disk with a file system, and a directory
// for everything else.
type site struct {
	*disk.Disk
	scratch    string
	mountpoint string // a directory in scratch
}

// newSite makes a site whose disk is not mounted.
func newSite(fs disk.FS, size int64) (*site, error) { return makeSite(fs, size, disk.Start) }

func makeSite(fs disk.FS, size int64, start func(size int64) (*disk.Disk, error)) (s *site, err error) {
	s = &site{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.scratch, err = os.MkdirTemp("", "record"); err != nil {
		return s, err
	}
	s.mountpoint = filepath.Join(s.scratch, "disk")
	if err := os.Mkdir(s.mountpoint, 0o700); err != nil {
		return s, err
	}
	if s.Disk, err = start(size); err != nil {
		return s, err
	}
	return s, s.Format(fs)
}

// begin makes what is on the disk the base of a recording, and mounts it.
func (s *site) begin(r *Recording) error {
	if err := s.DropCache(); err != nil {
		return err
	}
	var err error
	if r.Base, err = state.ReadImage(s.Disk); err != nil {
		return err
	}
	if err := s.Reset(); err != nil {
		return err
	}
	return s.Mount(r.FS, s.mountpoint, r.Options...)
}

// takeLog makes the requests that the disk got so far the log of the recording.
func (s *site) takeLog(r *Recording) error {
	entries, err := s.Log(0)
	if err != nil {
		return err
	}
	r.Log, r.Marks = state.NewLog(entries), workload.Marks(entries)
	return nil
}

// Close ends the disk, mounted or not, and removes the directory.
func (s *site) Close() (err error) {
	if s.Disk != nil {
		err = s.Disk.Close()
	}
	return errors.Join(err, os.RemoveAll(s.scratch))
}

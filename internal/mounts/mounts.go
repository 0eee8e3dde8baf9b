// Package mounts lists what is mounted on the machine, in every mount namespace, and
// which overlay file systems are in use although their mount was detached (umount -l).
//
// [Machine.Complete] is false when the list may be incomplete.
package mounts

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Mount is one mount in one namespace; see proc_pid_mountinfo(5).
type Mount struct {
	Device  Device // of the superblock
	Type    string // of the file system
	Root    string // the path in the file system that is mounted, as it is named now
	Point   string // where, in its namespace
	Options string // of the superblock: for overlay the directories, as they were named when it was mounted
}

// Device numbers a superblock. Overlay mounts have a number of their own, which
// all their files have, too, when their layers are on one file system.
type Device struct{ Major, Minor uint32 }

func (d Device) String() string { return fmt.Sprintf("%d:%d", d.Major, d.Minor) }

// Machine is what was found.
type Machine struct {
	Mounts []Mount // of all namespaces, each namespace once
	// Complete is false when this process cannot see all processes, or when a
	// namespace is kept without a process, by a bind mount or a descriptor.
	Complete bool
	// Detached are overlay superblocks that processes use files of and that are
	// mounted nowhere. A process refers to a file by a descriptor, as its working
	// directory, root or program, or by a mapping.
	Detached []Device
}

// initPIDNamespace is the inode number of the PID namespace in which all
// processes are visible (PROC_PID_INIT_INO of include/linux/proc_ns.h).
const initPIDNamespace = "pid:[4026531836]"

// overlayMagic is the type of an overlay file system in statfs(2).
const overlayMagic = unix.OVERLAYFS_SUPER_MAGIC

// readWithin bounds the time that Read takes. A detached mount of a network file system
// whose server does not respond can block it for ever.
const readWithin = 10 * time.Second

// ErrStuck is returned by Read when it has not ended in time. Every later call returns it
// until that one has ended.
var ErrStuck = errors.New("a file system does not respond")

var reading = make(chan struct{}, 1)

// Read examines all processes. It takes some milliseconds per hundred of them.
func Read() (Machine, error) {
	limit := time.NewTimer(readWithin)
	defer limit.Stop()
	select {
	case reading <- struct{}{}:
	case <-limit.C:
		return Machine{}, ErrStuck
	}
	type result struct {
		m   Machine
		err error
	}
	ended := make(chan result, 1)
	go func() {
		defer func() { <-reading }()
		m, err := read()
		ended <- result{m, err}
	}()
	select {
	case r := <-ended:
		return r.m, r.err
	case <-limit.C:
		return Machine{}, ErrStuck
	}
}

func read() (Machine, error) {
	pidNamespace, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return Machine{}, err
	}
	s := scan{
		m:          Machine{Complete: pidNamespace == initPIDNamespace},
		namespaces: map[string]bool{}, kept: map[string]bool{}, listed: map[Device]bool{}, others: map[Device]bool{},
	}
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return Machine{}, err
	}
	var dirs []string
	for _, p := range processes {
		if _, err := strconv.Atoi(p.Name()); err == nil {
			dirs = append(dirs, "/proc/"+p.Name())
		}
	}
	// First all mounts, then all files: a mount that is detached in between is
	// still listed, and counts.
	for _, dir := range dirs {
		if err := s.mounts(dir); err != nil {
			return Machine{}, err
		}
	}
	for _, dir := range dirs {
		s.files(dir)
	}
	for ns := range s.kept {
		if !s.namespaces[ns] {
			s.m.Complete = false
		}
	}
	return s.m, nil
}

type scan struct {
	m          Machine
	namespaces map[string]bool // those that were read, such as mnt:[4026531841]
	kept       map[string]bool // those that something other than a process keeps
	listed     map[Device]bool // superblocks that are mounted somewhere
	others     map[Device]bool // superblocks that are mounted nowhere and are no overlay, or are in Detached
}

// mounts reads the namespaces of a process: each thread may have its own.
func (s *scan) mounts(process string) error {
	threads, err := os.ReadDir(process + "/task")
	if err != nil {
		s.missed(err)
		return nil
	}
	for _, thread := range threads {
		dir := process + "/task/" + thread.Name()
		ns, err := os.Readlink(dir + "/ns/mnt")
		if err != nil {
			s.missed(err)
			continue
		}
		if s.namespaces[ns] {
			continue
		}
		f, err := os.Open(dir + "/mountinfo")
		if err != nil {
			s.missed(err)
			continue
		}
		found, err := mountinfo.GetMountsFromReader(f, nil)
		if err = errors.Join(err, f.Close()); gone(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s/mountinfo: %w", dir, err)
		}
		s.namespaces[ns] = true
		for _, m := range found {
			d := Device{uint32(m.Major), uint32(m.Minor)}
			s.listed[d] = true
			s.m.Mounts = append(s.m.Mounts, Mount{Device: d, Type: m.FSType, Root: m.Root, Point: m.Mountpoint, Options: m.VFSOptions})
			if m.FSType == "nsfs" && strings.HasPrefix(m.Root, "mnt:[") {
				s.kept[m.Root] = true
			}
		}
	}
	return nil
}

// files finds detached overlay mounts among the files that a process uses.
func (s *scan) files(process string) {
	for _, link := range []string{"cwd", "root", "exe"} {
		s.file(process + "/" + link)
	}
	n := s.filesIn(process + "/fd")
	s.filesIn(process + "/map_files")
	// Threads share descriptors, unless one has a table of its own;
	// a process whose first thread has ended shows none there.
	if threads, err := os.ReadDir(process + "/task"); err == nil && (n == 0 || len(threads) > 1) {
		for _, thread := range threads {
			dir := process + "/task/" + thread.Name()
			s.file(dir + "/cwd")
			s.file(dir + "/root")
			if n == 0 {
				s.filesIn(dir + "/fd")
			}
		}
	}
}

func (s *scan) filesIn(dir string) (n int) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		s.missed(err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		s.file(path)
		if filepath.Base(dir) == "fd" {
			if target, err := os.Readlink(path); err == nil && strings.HasPrefix(target, "mnt:[") {
				s.kept[target] = true
			}
		}
	}
	return len(entries)
}

// file reads the superblock of a file and nothing else, and sends no request to the
// server of a network file system.
func (s *scan) file(path string) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, 0, &st); err != nil {
		s.missed(err)
		return
	}
	d := Device{st.Dev_major, st.Dev_minor}
	if d.Major != 0 || s.listed[d] || s.others[d] {
		return
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		s.missed(err)
		return
	}
	s.others[d] = true
	if fs.Type == overlayMagic {
		s.m.Detached = append(s.m.Detached, d)
	}
}

// missed notes that something was not seen, unless it is gone.
func (s *scan) missed(err error) {
	if !gone(err) {
		s.m.Complete = false
	}
}

// gone reports whether an error means that a process, or its file, has ended:
// EINVAL comes from the mountinfo of one that is ending. Some descriptors have
// no file.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL)
}

package noharm

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// For the search for what an event does.
var (
	only     = flag.String("events", "", "run only the events whose names match the regular expression")
	together = flag.Bool("together", false, "do not try events one by one when there are problems with all of them")
)

func selected(e event) bool { return *only == "" || regexp.MustCompile(*only).MatchString(e.name) }

// cycles are the life of a node, in this order.
var cycles = []cycle{
	{name: "labels", events: []event{
		{name: "selinux-relabel", do: labels("security.selinux", "system_u:object_r:container_ro_file_t:s0\x00")},
		{name: "ima-fix", do: labels("security.ima", "\x04\x04"+strings.Repeat("h", 32))},
		{name: "evm-key", do: labels("security.evm", "\x05"+strings.Repeat("k", 20))},
		{name: "smack-label", do: labels("security.SMACK64", "_")},
		{name: "scanner-stamps", do: stamps},
		{name: "nodump-noatime-flags", do: flags(0x40 | 0x80)}, // FS_NODUMP_FL, FS_NOATIME_FL
		{name: "project-ids", fs: []string{"xfs"}, do: projects},
		{name: "acl-repeated", do: sameACLs},
		{name: "touch-a", do: accessTimes},
		{name: "find-grep-tar", do: readers},
		{name: "antivirus", do: antivirus},
		{name: "atime-remounts", do: atimes},
	}},
	{name: "labels removed", events: []event{
		{name: "selinux-disabled", do: unlabel("security.selinux")},
		{name: "ima-evm-smack-removed", do: unlabel("security.ima", "security.evm", "security.SMACK64")},
		{name: "selinux-other-policy", do: labels("security.selinux", "system_u:object_r:container_share_t:s0:c1,c2\x00")},
		{name: "append-only", do: flags(0x20)}, // FS_APPEND_FL
		{name: "immutable", do: flags(0x10)},   // FS_IMMUTABLE_FL
	}},
	{name: "copies", events: []event{
		{name: "cp-al", do: copied("cp", "-al")},
		{name: "rsync-link-dest", do: rsyncLinks},
		{name: "reflink-copy", fs: []string{"xfs", "btrfs"}, do: copied("cp", "-a", "--reflink=auto")},
		{name: "hardlink-within-layers", do: hardlinkWithin},
	}},
	{name: "dedup", events: []event{
		{name: "dedup-extents", fs: []string{"xfs", "btrfs"}, do: dedup},
		{name: "hardlink-across-layers", do: hardlinkAcross},
		{name: "defragmentation", do: defragment},
		{name: "fstrim", do: run("fstrim", "")},
		{name: "holes-dug", do: holes(unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE)},
		{name: "btrfs-snapshot", fs: []string{"btrfs"}, do: btrfsSnapshot},
		{name: "btrfs-balance", fs: []string{"btrfs"}, do: run("btrfs", "balance", "start", "--full-balance", "")},
		{name: "btrfs-compression", fs: []string{"btrfs"}, do: btrfsCompression},
		{name: "btrfs-quota", fs: []string{"btrfs"}, do: run("btrfs", "quota", "enable", "")},
	}},
	{name: "preallocation", events: []event{
		{name: "holes-filled", do: holes(unix.FALLOC_FL_KEEP_SIZE)},
		{name: "renamed-and-back", do: renamed},
	}},
	{name: "mounts", allow: doubt, events: []event{
		{name: "tmpfs-in-layer", do: mountIn(0, "tmpfs")},
		{name: "directory-bound-into-layer", do: mountIn(1, "directory")},
		{name: "file-bound-into-layer", do: mountIn(2, "file")},
		{name: "image-mount", do: imageMount},
	}},
	{name: "daemon in distress", allow: doubt, events: []event{
		{name: "descriptors-used-up", do: noDescriptors},
		{name: "decompressor-killed", do: decompressorKilled},
		{name: "killed-while-verifying", do: killedWhileVerifying},
		{name: "verbs-side-by-side", do: sideBySide},
	}},
	{name: "clock 1970", events: []event{{name: "clock-in-1970", do: clock(1970)}}},
	{name: "clock 2098", events: []event{{name: "clock-in-2098", do: clock(2098)}}},
	{name: "gone for a moment", allow: damage, events: []event{
		// The order in which they end is the reverse: nothing is left to be dropped
		// when containerd starts again.
		{name: "scrub-off", always: true, do: scrubOff},
		{name: "containerd-down", always: true, do: containerdDown},
		{name: "content-store-away", always: true, blobs: true, do: contentAway},
		{name: "seal-away", do: sealAway},
		{name: "layer-away", do: layerAway},
		{name: "modes-changed-and-back", do: modesChanged},
	}},
	{name: "file system", state: unused, events: []event{
		{name: "fsck", do: fsck},
		{name: "read-only-remount", do: readOnly},
		{name: "shut-down", fs: []string{"ext4", "xfs"}, do: shutDown},
	}},
	// What is missing is reported as missing.
	{name: "not mounted", state: unused, allow: damage, events: []event{
		{name: "snapshots-not-mounted", do: notMounted},
	}},
	{name: "migration", state: unused, events: []event{
		{name: "migrated-with-tar-in-seconds", fs: []string{"ext4"}, do: migrate("ext4", tarSeconds)},
		// rsync is no such tool: since 3.2 it leaves out trusted.overlay.*, and thereby
		// opaque marks, which is harm.
		{name: "migrated-with-tar", fs: []string{"xfs"}, do: migrate("btrfs", tarExact)},
		{name: "migrated-with-cp", fs: []string{"btrfs"}, do: migrate("xfs", "cp -a $0/. $1/")},
	}},
}

// tarSeconds keeps all but parts of seconds, as the default format of GNU tar.
const tarSeconds = `tar -C $0 --xattrs --acls --format=posix --pax-option=delete=mtime,delete=atime,delete=ctime --sparse -cf - . |
	tar -C $1 --xattrs --xattrs-include='*' --acls --same-owner --numeric-owner -xpf -`

// tarExact keeps all there is.
const tarExact = `tar -C $0 --xattrs --acls --format=posix --sparse -cf - . |
	tar -C $1 --xattrs --xattrs-include='*' --acls --same-owner --numeric-owner -xpf -`

// each visits every entry of every layer.
func (n *node) each(t testing.TB, visit func(path string, st *unix.Stat_t) error) {
	t.Helper()
	for _, id := range n.ids {
		check(t, filepath.WalkDir(n.tree(id), func(path string, _ fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); err != nil {
				return &os.PathError{Op: "lstat", Path: path, Err: err}
			}
			if err := visit(path, &st); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			return nil
		}))
	}
}

func isFile(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFREG }
func isDir(st *unix.Stat_t) bool  { return st.Mode&unix.S_IFMT == unix.S_IFDIR }

// run runs a command; an empty argument stands for the disk's mount point.
func run(argv ...string) func(testing.TB, *node) func() {
	return func(t testing.TB, n *node) func() {
		all := append([]string(nil), argv...)
		for i := range all {
			if all[i] == "" {
				all[i] = n.dir
			}
		}
		command(t, all...)
		return nil
	}
}

// labels gives everything a security attribute, as setfiles, restorecon and the
// kernel's integrity modules do.
func labels(name, value string) func(testing.TB, *node) func() {
	return func(t testing.TB, n *node) func() {
		n.each(t, func(path string, _ *unix.Stat_t) error { return unix.Lsetxattr(path, name, []byte(value), 0) })
		return nil
	}
}

// stamps are attributes that programs leave on what they have seen.
func stamps(t testing.TB, n *node) func() {
	n.each(t, func(path string, st *unix.Stat_t) error {
		if !isFile(st) && !isDir(st) {
			return nil
		}
		return errors.Join(
			unix.Lsetxattr(path, "user.shatag.ts", []byte("1700000000.0"), 0),
			unix.Lsetxattr(path, "trusted.glusterfs.volume-id", []byte("0123456789abcdef"), 0),
		)
	})
	return nil
}

func unlabel(names ...string) func(testing.TB, *node) func() {
	return func(t testing.TB, n *node) func() {
		n.each(t, func(path string, _ *unix.Stat_t) (err error) {
			for _, name := range names {
				if e := unix.Lremovexattr(path, name); e != nil && !errors.Is(e, unix.ENODATA) {
					err = errors.Join(err, e)
				}
			}
			return err
		})
		return nil
	}
}

// flags sets flags of inodes, as chattr(1), and clears them in the end.
func flags(set uint32) func(testing.TB, *node) func() {
	return func(t testing.TB, n *node) func() {
		change := func(change func(uint32) uint32) {
			n.each(t, func(path string, st *unix.Stat_t) error {
				if !isFile(st) && !isDir(st) {
					return nil
				}
				f, err := os.Open(path)
				if err != nil {
					return err
				}
				defer f.Close()
				var now uint32
				if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.FS_IOC_GETFLAGS, uintptr(unsafe.Pointer(&now))); errno != 0 {
					return errno
				}
				now = change(now)
				if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.FS_IOC_SETFLAGS, uintptr(unsafe.Pointer(&now))); errno != 0 {
					return errno
				}
				return nil
			})
		}
		change(func(now uint32) uint32 { return now | set })
		return func() { change(func(now uint32) uint32 { return now &^ set }) }
	}
}

// projects gives everything a project id, as xfs_quota and container runtimes do
// (struct fsxattr of linux/fs.h). ext4 has them only with a kernel that has quotas.
func projects(t testing.TB, n *node) func() {
	const getxattr, setxattr = 0x801c581f, 0x401c5820
	n.each(t, func(path string, st *unix.Stat_t) error {
		if !isFile(st) && !isDir(st) {
			return nil
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		var x struct {
			flags, extent, extents, project, cow uint32
			_                                    [8]byte
		}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), getxattr, uintptr(unsafe.Pointer(&x))); errno != 0 {
			return errno
		}
		x.project = 4711
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), setxattr, uintptr(unsafe.Pointer(&x))); errno != 0 {
			return errno
		}
		return nil
	})
	return nil
}

// sameACLs writes each access control list as it is, and the list that only
// repeats the mode where there is none, which a file system does not keep.
func sameACLs(t testing.TB, n *node) func() {
	const name = "system.posix_acl_access"
	n.each(t, func(path string, st *unix.Stat_t) error {
		if !isFile(st) && !isDir(st) {
			return nil
		}
		value := make([]byte, 1024)
		size, err := unix.Lgetxattr(path, name, value)
		if errors.Is(err, unix.ENODATA) {
			value = binary.LittleEndian.AppendUint32(nil, 2)
			for i, tag := range []uint16{0x01, 0x04, 0x20} {
				value = binary.LittleEndian.AppendUint16(value, tag)
				value = binary.LittleEndian.AppendUint16(value, uint16(st.Mode>>(6-3*i)&7))
				value = binary.LittleEndian.AppendUint32(value, ^uint32(0))
			}
			size, err = len(value), nil
		}
		if err != nil {
			return err
		}
		return unix.Lsetxattr(path, name, value[:size], 0)
	})
	return nil
}

// accessTimes sets access times and nothing else, as touch -a.
func accessTimes(t testing.TB, n *node) func() {
	n.each(t, func(path string, _ *unix.Stat_t) error {
		times := []unix.Timespec{{Sec: 1_600_000_000}, {Nsec: unix.UTIME_OMIT}}
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, times, unix.AT_SYMLINK_NOFOLLOW)
	})
	return nil
}

// readers read everything: a search, an index, a backup.
func readers(t testing.TB, n *node) func() {
	dir := filepath.Join(n.Daemon.Root, "snapshots")
	// The daemon's own files may come and go meanwhile, of which a reader complains.
	command(t, "find", dir, "-ignore_readdir_race", "-newer", n.Daemon.Root, "-size", "+1000000k")
	command(t, "sh", "-c", "grep -rs nothing-has-this-text "+dir+"; test $? -le 2")
	command(t, "sh", "-c", "tar -cf - "+dir+" 2>/dev/null | cat >/dev/null")
	return nil
}

// antivirus has each access on the disk wait for a permission, and opens every
// file itself (fanotify(7)).
func antivirus(t testing.TB, n *node) func() {
	group, err := unix.FanotifyInit(unix.FAN_CLASS_CONTENT|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK, unix.O_RDONLY|unix.O_LARGEFILE|unix.O_CLOEXEC)
	check(t, os.NewSyscallError("fanotify_init", err))
	events := os.NewFile(uintptr(group), "fanotify")
	check(t, unix.FanotifyMark(group, unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, unix.FAN_OPEN_PERM|unix.FAN_ACCESS_PERM, unix.AT_FDCWD, n.dir))
	var answering sync.WaitGroup
	answering.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			size, err := events.Read(buf)
			if err != nil {
				return // closed: the kernel allows whatever waits
			}
			for b := buf[:size]; len(b) >= 24; {
				event := (*unix.FanotifyEventMetadata)(unsafe.Pointer(&b[0]))
				answer := unix.FanotifyResponse{Fd: event.Fd, Response: unix.FAN_ALLOW}
				_, _ = events.Write(unsafe.Slice((*byte)(unsafe.Pointer(&answer)), unsafe.Sizeof(answer)))
				_ = unix.Close(int(event.Fd))
				b = b[event.Event_len:]
			}
		}
	})
	n.each(t, func(path string, st *unix.Stat_t) error {
		if !isFile(st) {
			return nil
		}
		_, err := os.ReadFile(path)
		return err
	})
	return func() {
		check(t, events.Close())
		answering.Wait()
	}
}

// atimes changes how access times are kept.
func atimes(t testing.TB, n *node) func() {
	for _, option := range []string{"strictatime", "noatime", "nodiratime", "lazytime"} {
		command(t, "mount", "-o", "remount,"+option, n.dir)
		readers(t, n)
	}
	command(t, "mount", "-o", "remount,relatime,nolazytime", n.dir)
	return nil
}

// copied makes a copy of the root beside it, which is removed in the end. Files of a daemon
// that goes on may vanish meanwhile, but those of layers.
func copied(argv ...string) func(testing.TB, *node) func() {
	return func(t testing.TB, n *node) func() {
		to := n.Path("copy-by" + strings.Join(argv, ""))
		out, err := exec.CommandContext(t.Context(), argv[0], append(argv[1:], n.Daemon.Root, to)...).CombinedOutput()
		for line := range strings.Lines(string(out)) {
			if !strings.Contains(line, "No such file or directory") {
				t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
			}
		}
		held := must[string](t)(filepath.Rel(n.Daemon.Root, n.layer(0, "base/held")))
		must[os.FileInfo](t)(os.Lstat(filepath.Join(to, held)))
		return func() { check(t, os.RemoveAll(to)) }
	}
}

// rsyncLinks makes an incremental backup out of hard links.
func rsyncLinks(t testing.TB, n *node) func() {
	to := n.Path("backup")
	// 23 and 24: files that changed or vanished meanwhile, of a daemon that goes on.
	command(t, "sh", "-c", "rsync -aHAX --numeric-ids --link-dest=$0 $0/ $1/; s=$?; test $s = 0 -o $s = 23 -o $s = 24", n.Daemon.Root, to)
	var st unix.Stat_t
	if check(t, unix.Lstat(n.layer(0, "base/held"), &st)); st.Nlink < 2 {
		t.Fatal("rsync has made no hard links")
	}
	return func() { check(t, os.RemoveAll(to)) }
}

// unseen does something while the daemon stands still. What a tool has half done, such
// as a name of its own for a moment, is another tree: the daemon may report it, and
// verifies it again before it does anything.
func (n *node) unseen(t testing.TB, do func()) {
	t.Helper()
	check(t, n.Daemon.While(func() error { do(); return nil }))
}

// hardlinkWithin makes equal files of a layer one file (hardlink(1)).
func hardlinkWithin(t testing.TB, n *node) func() {
	n.unseen(t, func() {
		for i := range n.ids {
			command(t, "hardlink", "-X", n.layer(i))
		}
	})
	n.sameInode(t, n.layer(0, "base/twin-a"), n.layer(0, "base/twin-b"))
	return nil
}

// hardlinkAcross does it with those of all layers.
func hardlinkAcross(t testing.TB, n *node) func() {
	argv := []string{"hardlink", "-X"}
	for i := range n.ids {
		argv = append(argv, n.layer(i))
	}
	n.unseen(t, func() { command(t, argv...) })
	n.sameInode(t, n.layer(0, "base/twin-a"), n.layer(2, "top/twin-b"))
	return nil
}

func (n *node) sameInode(t testing.TB, a, b string) {
	t.Helper()
	var x, y unix.Stat_t
	if err := errors.Join(unix.Lstat(a, &x), unix.Lstat(b, &y)); err != nil || x.Ino != y.Ino {
		t.Fatalf("%s and %s are inodes %d and %d: %v", a, b, x.Ino, y.Ino, err)
	}
}

// dedup lets equal files share extents (duperemove, bees).
func dedup(t testing.TB, n *node) func() {
	from := must[*os.File](t)(os.Open(n.layer(0, "base/twin-a")))
	defer from.Close()
	size := must[os.FileInfo](t)(from.Stat()).Size()
	for i, layer := range layerNames[1:] {
		to := must[*os.File](t)(os.Open(n.layer(i+1, layer, "twin-b")))
		r := unix.FileDedupeRange{Src_length: uint64(size), Info: []unix.FileDedupeRangeInfo{{Dest_fd: int64(to.Fd())}}}
		err := unix.IoctlFileDedupeRange(int(from.Fd()), &r)
		to.Close()
		if err != nil || r.Info[0].Status < 0 {
			t.Fatalf("share extents of %s: status %d: %v", to.Name(), r.Info[0].Status, err)
		}
	}
	return nil
}

func defragment(t testing.TB, n *node) func() {
	dir := filepath.Join(n.Daemon.Root, "snapshots")
	switch n.fs {
	case "ext4":
		command(t, "e4defrag", dir)
	case "xfs":
		for i, layer := range layerNames {
			command(t, "xfs_fsr", n.layer(i, layer, "big"), n.layer(i, layer, "twin-a"), n.layer(i, layer, "zeros"))
		}
	case "btrfs":
		command(t, "btrfs", "filesystem", "defragment", "-r", "-czstd", dir)
	}
	return nil
}

// holes calls fallocate(2) on the files of zeros, and puts their times back.
func holes(mode uint32) func(testing.TB, *node) func() {
	return func(t testing.TB, n *node) func() {
		n.unseen(t, func() {
			for i, layer := range layerNames {
				f := must[*os.File](t)(os.OpenFile(n.layer(i, layer, "zeros"), os.O_RDWR, 0))
				info := must[os.FileInfo](t)(f.Stat())
				check(t, os.NewSyscallError("fallocate", unix.Fallocate(int(f.Fd()), mode, 0, info.Size())))
				check(t, f.Close())
				check(t, os.Chtimes(f.Name(), info.ModTime(), info.ModTime()))
			}
		})
		return nil
	}
}

func btrfsSnapshot(t testing.TB, n *node) func() {
	to := n.Path("snapshot")
	command(t, "btrfs", "subvolume", "snapshot", "-r", n.dir, to)
	return func() { command(t, "btrfs", "subvolume", "delete", to) }
}

// btrfsCompression sets the property, which is an extended attribute.
func btrfsCompression(t testing.TB, n *node) func() {
	for i, layer := range layerNames {
		command(t, "btrfs", "property", "set", n.layer(i, layer, "big"), "compression", "zstd")
	}
	return nil
}

// renamed moves the directories of layers away and back before anything sees it.
func renamed(t testing.TB, n *node) func() {
	n.halt(t)
	for _, id := range n.ids {
		check(t, os.Rename(n.tree(id), n.snapshot(id)+"/other"))
		check(t, os.Rename(n.snapshot(id)+"/other", n.tree(id)))
	}
	n.boot(t)
	return nil
}

// mountIn mounts something in a layer, in the namespace of the daemon.
func mountIn(i int, what string) func(testing.TB, *node) func() {
	return func(t testing.TB, n *node) func() {
		at := n.layer(i, layerNames[i], "mount-point")
		switch what {
		case "tmpfs":
			command(t, "mount", "-t", "tmpfs", "tmpfs", at)
			check(t, os.WriteFile(filepath.Join(at, "mounted"), []byte("not of the layer"), 0o644))
		case "directory":
			from := scratch(t)
			check(t, os.WriteFile(filepath.Join(from, "mounted"), []byte("not of the layer"), 0o644))
			command(t, "mount", "--bind", from, at)
		case "file":
			at = filepath.Join(at, "below")
			from := filepath.Join(scratch(t), "file")
			check(t, os.WriteFile(from, []byte("another file"), 0o600))
			command(t, "mount", "--bind", from, at)
		}
		// Wherever it is by now: a tree that is replaced takes its mounts along.
		return func() { check(t, kit.UnmountBelow(n.Daemon.Root)) }
	}
}

// imageMount reads the image as an operator does.
func imageMount(t testing.TB, n *node) func() {
	at := scratch(t)
	n.ctr(t, "images", "mount", "--snapshotter", "durable", n.image.Ref, at)
	if _, err := os.Stat(filepath.Join(at, "top/held")); err != nil {
		t.Fatal(err)
	}
	return func() {
		n.ctr(t, "images", "unmount", "--rm", "--snapshotter", "durable", at)
	}
}

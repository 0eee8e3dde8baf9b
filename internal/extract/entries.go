package extract

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/log"
	"github.com/moby/sys/userns"
	"golang.org/x/sys/unix"

	filetree "github.com/durable-snapshotter/durable-snapshotter/internal/tree"
)

// ErrInvalid is wrapped by the error for a tar that no applier takes.
var ErrInvalid = errors.New("invalid archive")

// extraction is one run of Apply. It belongs to the goroutine that reads the tar.
type extraction struct {
	Options
	ctx    context.Context
	tree   *tree
	files  *files
	result Result

	content content

	timed    []timed // directories, in the order of the tar
	unpacked *paths  // of all entries, for Remove only
	emptied  *paths  // directories that were emptied, for Remove only
}

// timed is a directory that gets its times at the end, when nothing more is made in it.
type timed struct {
	dir   *dir
	path  string // in the tar, when a link is on the way
	times [2]unix.Timespec
}

// run reads a tar to its end, and waits until all is written.
func (x *extraction) run(s *stream) error {
	defer x.files.end()
	t := tar.NewReader(s)
	x.content = content{stream: s, tar: t}
	if x.Digests {
		x.content.sum = sha256.New()
	}
	for {
		if err := context.Cause(x.ctx); err != nil {
			return err
		}
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return x.setTimes()
		}
		if err != nil {
			return fmt.Errorf("read the tar: %w", err)
		}
		x.result.Entries++
		if err := x.entry(h); err != nil {
			return err
		}
	}
}

// entry applies one entry, in the order of containerd's applyNaive (pkg/archive/tar.go).
func (x *extraction) entry(h *tar.Header) error {
	if (h.Typeflag == tar.TypeBlock || h.Typeflag == tar.TypeChar) && userns.RunningInUserNS() {
		log.G(x.ctx).Warnf("file %q ignored: a user namespace has no devices", h.Name)
		return nil
	}
	h.Name = filepath.Clean(h.Name)
	parent, base := filepath.Split(h.Name)
	if base = filepath.Join("/", base)[1:]; base == "" {
		return nil // the root, whose attributes no tar changes
	}
	d, linked, err := x.tree.find(parent)
	if err != nil {
		return err
	}
	if err := x.tree.short(d.at(base)); err != nil {
		return err
	}
	if strings.HasPrefix(base, whiteoutPrefix) {
		return x.whiteout(d, base, h)
	}
	switch h.Typeflag {
	case tar.TypeDir:
		err = x.directory(d, base, h, linked)
	case tar.TypeReg:
		err = x.regular(d, base, h)
	case tar.TypeSymlink:
		err = x.make(d, base, h, func(at int) error { return unix.Symlinkat(h.Linkname, at, base) })
	case tar.TypeLink:
		err = x.hardlink(d, base, h)
	case tar.TypeBlock, tar.TypeChar, tar.TypeFifo:
		err = x.device(d, base, h)
	case tar.TypeXGlobalHeader:
		// containerd removes what has its name, and makes nothing.
		err = x.tree.remove(d, base)
	default:
		err = fmt.Errorf("entry %q has the unknown type %q: %w", h.Name, h.Typeflag, ErrInvalid)
	}
	if err == nil && x.unpacked != nil {
		x.unpacked.add(d.at(base))
	}
	return err
}

// replace makes a name with create, in the place of what had it before. create must fail with
// EEXIST if the name exists.
func (x *extraction) replace(d *dir, base string, create func(at int) error) error {
	for replaced := false; ; replaced = true {
		at, err := x.tree.fd(d)
		if err != nil {
			return err
		}
		if err = create(at); !errors.Is(err, unix.EEXIST) || replaced {
			return err
		}
		if err := x.tree.remove(d, base); err != nil {
			return err
		}
	}
}

// regular makes a file and hands it to those who write it.
func (x *extraction) regular(d *dir, base string, h *tar.Header) error {
	var fd int
	a := attributesOf(h)
	err := x.replace(d, base, func(at int) (err error) {
		fd, err = filetree.Retry(func() (int, error) {
			return unix.Openat(at, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, a.mode&permissions)
		})
		return err
	})
	if err != nil {
		return failed("create", h.Name, err)
	}
	x.content.begin(h)
	return x.files.add(&file{name: h.Name, fd: fd, size: h.Size, attributes: a}, &x.content)
}

// make makes what is no directory and no regular file, and gives it its attributes.
func (x *extraction) make(d *dir, base string, h *tar.Header, create func(at int) error) error {
	if err := x.replace(d, base, create); err != nil {
		return failed("create", h.Name, err)
	}
	at, err := x.tree.fd(d)
	if err != nil {
		return err
	}
	a := attributesOf(h)
	return x.setAttributes(at, base, h.Name, &a, func() (uint32, error) {
		switch h.Typeflag {
		case tar.TypeSymlink:
			return unix.S_IFLNK, nil
		case tar.TypeLink:
			st, err := stat(at, base)
			return st.Mode, err
		}
		return unix.S_IFIFO, nil
	})
}

// setAttributes gives an entry all its attributes, in containerd's order: a change of the
// owner removes capabilities and mode bits. mode returns its type.
func (x *extraction) setAttributes(at int, base, name string, a *attributes, mode func() (uint32, error)) error {
	if err := a.owned(name, unix.Fchownat(at, base, a.uid, a.gid, unix.AT_SYMLINK_NOFOLLOW)); err != nil {
		return err
	}
	m, err := mode()
	if err != nil {
		return failed("stat", name, err)
	}
	kind := m & unix.S_IFMT
	if err := a.setXattrs(x.ctx, name, kind == unix.S_IFREG || kind == unix.S_IFDIR, func(attr string, value []byte) error {
		return unix.Lsetxattr(procPath(at, base), attr, value, 0)
	}); err != nil {
		return err
	}
	if kind != unix.S_IFLNK {
		if err := unix.Fchmodat(at, base, a.mode, 0); err != nil {
			return failed("chmod", name, err)
		}
	}
	return setTimes(at, base, name, a.times)
}

func setTimes(at int, base, name string, times [2]unix.Timespec) error {
	if err := unix.UtimesNanoAt(at, base, times[:], unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return failed("set the times of", name, err)
	}
	return nil
}

// device makes a device or a pipe.
func (x *extraction) device(d *dir, base string, h *tar.Header) error {
	mode := uint32(h.Mode & modeBits)
	switch h.Typeflag {
	case tar.TypeBlock:
		mode |= unix.S_IFBLK
	case tar.TypeChar:
		mode |= unix.S_IFCHR
	case tar.TypeFifo:
		mode |= unix.S_IFIFO
	}
	for _, n := range []int64{h.Devmajor, h.Devminor} {
		if n < 0 || n > math.MaxUint32 {
			return fmt.Errorf("device number %d:%d of %q is out of range: %w", h.Devmajor, h.Devminor, h.Name, ErrInvalid)
		}
	}
	number := int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))
	return x.make(d, base, h, func(at int) error { return unix.Mknodat(at, base, mode, number) })
}

// hardlink makes another name for a file, and gives the file the attributes of this
// entry.
func (x *extraction) hardlink(d *dir, base string, h *tar.Header) error {
	// Those who write the file set its attributes, too.
	if err := x.files.wait(); err != nil {
		return err
	}
	target, name, err := x.target(h.Linkname)
	if err != nil {
		return err
	}
	return x.make(d, base, h, func(int) error {
		// The second call may have closed the first descriptor, and the third takes
		// none away: the other one is the youngest.
		if _, err := x.tree.fd(target); err != nil {
			return err
		}
		to, err := x.tree.fd(d)
		if err != nil {
			return err
		}
		from, err := x.tree.fd(target)
		if err != nil {
			return err
		}
		return unix.Linkat(from, name, to, base, 0)
	})
}

// target returns the directory and the name to which a hard link leads
// (hardlinkRootPath, pkg/archive/tar.go): links on the way are followed inside the
// root, the last name is not. A path out of the root is the root.
func (x *extraction) target(path string) (*dir, string, error) {
	parent, base := filepath.Split(path)
	if !strings.Contains(path, "..") && base != "" && base != "." {
		if d := x.tree.lookup(parent); d != nil {
			return d, base, x.tree.short(d.at(base))
		}
	}
	rel, err := x.tree.resolve(parent)
	if err != nil {
		return nil, "", err
	}
	rel = filepath.Join(rel, base)
	if rel == ".." || strings.HasPrefix(rel, "../") {
		rel = "."
	}
	if err := x.tree.short(rel); err != nil {
		return nil, "", err
	}
	parent, base = filepath.Split(rel)
	d := x.tree.root
	for name := range strings.SplitSeq(strings.Trim(parent, "/"), "/") {
		if name == "" {
			break
		}
		s := d.sub[name]
		if s == nil {
			if s, err = x.tree.enter(d, name); err != nil {
				return nil, "", err
			}
		}
		d = s
	}
	return d, base, nil
}

// directory makes a directory, or gives one that is there the attributes of the entry.
func (x *extraction) directory(d *dir, base string, h *tar.Header, linked bool) error {
	a := attributesOf(h)
	s, st, err := x.makeDir(d, base, &a)
	if err != nil {
		return err
	}
	at, err := x.tree.fd(d)
	if err != nil {
		return err
	}
	if st == nil || a.needChown(st) {
		if err := a.owned(h.Name, unix.Fchownat(at, base, a.uid, a.gid, unix.AT_SYMLINK_NOFOLLOW)); err != nil {
			return err
		}
	}
	if err := a.setXattrs(x.ctx, h.Name, true, func(attr string, value []byte) error {
		return unix.Lsetxattr(procPath(at, base), attr, value, 0)
	}); err != nil {
		return err
	}
	if st == nil || a.needChmod(st) {
		if err := unix.Fchmodat(at, base, a.mode, 0); err != nil {
			return failed("chmod", h.Name, err)
		}
	}
	last := timed{dir: s, times: a.times}
	if linked {
		// At the end the path may lead elsewhere.
		if err := setTimes(at, base, h.Name, a.times); err != nil {
			return err
		}
		last.dir, last.path = nil, h.Name
	}
	x.timed = append(x.timed, last)
	if x.Directory != nil {
		x.Directory(s.rel())
	}
	return nil
}

// makeDir returns the directory of an entry, with what the kernel has made of it; nil
// when it was there before.
func (x *extraction) makeDir(d *dir, base string, a *attributes) (*dir, *unix.Stat_t, error) {
	if s := d.sub[base]; s != nil {
		return s, nil, nil
	}
	s, st, err := x.tree.mkdir(d, base, a.mode&permissions)
	if !errors.Is(err, unix.EEXIST) {
		return s, &st, err
	}
	s, err = x.tree.enter(d, base)
	if err == nil {
		return s, nil, nil
	}
	if !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, errLink) {
		return nil, nil, err
	}
	if err := x.tree.remove(d, base); err != nil {
		return nil, nil, err
	}
	s, st, err = x.tree.mkdir(d, base, a.mode&permissions)
	return s, &st, err
}

// setTimes gives the directories the times of their entries. containerd finds each by its
// path once more, and gives them to what is there by then.
func (x *extraction) setTimes() error {
	for _, last := range x.timed {
		if last.dir != nil && !last.dir.gone {
			at, err := x.tree.fd(last.dir.parent)
			if err == nil {
				err = setTimes(at, last.dir.name, last.dir.rel(), last.times)
			}
			if err != nil {
				return err
			}
			continue
		}
		// What is there by now may be a file that is being written.
		if err := x.files.wait(); err != nil {
			return err
		}
		path := last.path
		if last.dir != nil {
			path = last.dir.rel()
		}
		rel, err := x.tree.resolve(path)
		if err != nil {
			return err
		}
		full := filepath.Join(x.tree.path, rel)
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, full, last.times[:], unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "set the times", Path: full, Err: err}
		}
	}
	return nil
}

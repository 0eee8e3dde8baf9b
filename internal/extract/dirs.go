package extract

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"

	filetree "github.com/durable-snapshotter/durable-snapshotter/internal/tree"
)

// openDirs is how many directories are open at most, beside the root.
const openDirs = 256

// tree is what is known of the directories of a tree. Only names of directories are
// kept: whether another name exists is what the kernel answers when it is to be made.
type tree struct {
	path string
	root *dir
	open []*dir // those with a descriptor, the one opened first comes first

	last     *dir // what find has found last, and for which path
	lastPath string
}

// dir is a directory that exists. One that was removed is not in its parent any more,
// and gone.
type dir struct {
	parent *dir // nil for the root
	name   string
	fd     int // opened with O_PATH, or closed
	gone   bool
	sub    map[string]*dir // those that are known
}

const closed = -1

func openTree(path string) (*tree, error) {
	fd, err := filetree.Retry(func() (int, error) {
		return unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return &tree{path: path, root: &dir{fd: fd}}, nil
}

func (t *tree) close() {
	for _, d := range t.open {
		d.shut()
	}
	t.root.shut()
}

func (d *dir) shut() {
	if d.fd != closed {
		_ = unix.Close(d.fd) // O_PATH: nothing was written through it
		d.fd = closed
	}
}

// rel is the path of a directory in the tree, "" for the root.
func (d *dir) rel() string {
	if d.parent == nil {
		return ""
	}
	return filepath.Join(d.parent.rel(), d.name)
}

// at is the path of a name in a directory, in the tree.
func (d *dir) at(name string) string { return filepath.Join(d.rel(), name) }

func (d *dir) add(name string, fd int) *dir {
	if d.sub == nil {
		d.sub = map[string]*dir{}
	}
	s := &dir{parent: d, name: name, fd: fd}
	d.sub[name] = s
	return s
}

// fd returns the descriptor of a directory, valid until the next call for another one.
func (t *tree) fd(d *dir) (int, error) {
	if d.fd != closed {
		return d.fd, nil
	}
	at, err := t.fd(d.parent)
	if err != nil {
		return closed, err
	}
	fd, err := openDir(at, d.name)
	if err != nil {
		return closed, failed("open", d.rel(), err)
	}
	t.opened(d, fd)
	return fd, nil
}

func (t *tree) opened(d *dir, fd int) {
	if len(t.open) >= openDirs {
		t.open[0].shut()
		t.open = append(t.open[:0], t.open[1:]...)
	}
	d.fd = fd
	t.open = append(t.open, d)
}

// openDir opens a directory in another one. The error for anything else, a symbolic link too,
// is ENOTDIR.
func openDir(at int, name string) (int, error) {
	return filetree.Retry(func() (int, error) {
		return unix.Openat(at, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
}

// errLink: a name on the way to a directory is a symbolic link.
var errLink = errors.New("a symbolic link is on the way")

// find returns the directory of a path of the tar, made with the mode 0755 where it or
// one on the way is missing, and whether a symbolic link is on the way to it.
// Links lead to what they mean inside the root.
func (t *tree) find(path string) (d *dir, linked bool, err error) {
	if t.last != nil && !t.last.gone && path == t.lastPath {
		return t.last, false, nil
	}
	d, err = t.walk(path)
	if !errors.Is(err, errLink) {
		t.last, t.lastPath = d, path
		return d, false, err
	}
	rel, err := t.resolve(path)
	if err != nil {
		return nil, true, err
	}
	d, err = t.walk(rel)
	return d, true, err
}

// resolve follows the links of a path, as containerd's applier does. The result has none.
func (t *tree) resolve(path string) (rel string, err error) {
	full, err := fs.RootPath(t.path, path)
	if err != nil {
		return "", failed("resolve", path, err)
	}
	return filepath.Rel(t.path, full)
}

// lookup is walk for a path whose directories are all known. It returns nil for any
// other.
func (t *tree) lookup(path string) *dir {
	d := t.root
	for name := range strings.SplitSeq(strings.Trim(filepath.Join("/", path), "/"), "/") {
		if name == "" {
			return d
		}
		if d = d.sub[name]; d == nil {
			return nil
		}
	}
	return d
}

func (t *tree) walk(path string) (*dir, error) {
	path = strings.Trim(filepath.Join("/", path), "/")
	if err := t.short(path); err != nil {
		return nil, err
	}
	d := t.root
	for name := range strings.SplitSeq(path, "/") {
		if name == "" {
			break
		}
		if s := d.sub[name]; s != nil {
			d = s
			continue
		}
		s, err := t.enter(d, name)
		if errors.Is(err, unix.ENOENT) {
			s, err = t.invent(d, name)
		}
		if err != nil {
			return nil, err
		}
		d = s
	}
	return d, nil
}

// short refuses what containerd cannot name: it passes whole paths to the kernel.
func (t *tree) short(rel string) error {
	if len(t.path)+1+len(rel) >= unix.PathMax {
		return failed("find", rel, unix.ENAMETOOLONG)
	}
	return nil
}

// enter returns a directory of which it is not known whether it exists. The error wraps
// ENOENT when it does not, errLink when it is a symbolic link.
func (t *tree) enter(d *dir, name string) (*dir, error) {
	at, err := t.fd(d)
	if err != nil {
		return nil, err
	}
	fd, err := openDir(at, name)
	if err == nil {
		s := d.add(name, closed)
		t.opened(s, fd)
		return s, nil
	}
	if errors.Is(err, unix.ENOTDIR) {
		if st, stErr := stat(at, name); stErr == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
			err = errLink
		}
	}
	return nil, failed("open", d.at(name), err)
}

// inventedMode is that of a directory without an entry (mkparent, pkg/archive/tar.go).
const inventedMode = 0o755

// invent makes a directory that has no entry in the tar, for something inside it.
func (t *tree) invent(d *dir, name string) (*dir, error) {
	s, st, err := t.mkdir(d, name, inventedMode)
	if err != nil {
		return nil, err
	}
	if st.Mode&modeBits != inventedMode {
		if err := unix.Fchmodat(d.fd, name, inventedMode, 0); err != nil {
			return nil, failed("chmod", d.at(name), err)
		}
	}
	return s, nil
}

// mkdir makes a directory; its mode may be another one, see attributes.needChmod.
func (t *tree) mkdir(d *dir, name string, mode uint32) (*dir, unix.Stat_t, error) {
	at, err := t.fd(d)
	if err != nil {
		return nil, unix.Stat_t{}, err
	}
	if err := unix.Mkdirat(at, name, mode); err != nil {
		return nil, unix.Stat_t{}, failed("mkdir", d.at(name), err)
	}
	st, err := stat(at, name)
	if err != nil {
		return nil, st, failed("stat", d.at(name), err)
	}
	return d.add(name, closed), st, nil
}

// stat is lstat(2) in a directory.
func stat(at int, name string) (st unix.Stat_t, err error) {
	return st, unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW)
}

// remove removes a name with all that is below it. That there is none is no error.
func (t *tree) remove(d *dir, name string) error {
	at, err := t.fd(d)
	if err != nil {
		return err
	}
	t.forget(d, name)
	err = unix.Unlinkat(at, name, 0)
	if errors.Is(err, unix.EISDIR) {
		err = os.RemoveAll(procPath(at, name))
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return failed("remove", d.at(name), err)
	}
	return nil
}

// forget forgets a directory and all that is below it.
func (t *tree) forget(d *dir, name string) {
	s := d.sub[name]
	if s == nil {
		return
	}
	delete(d.sub, name)
	var mark func(*dir)
	mark = func(s *dir) {
		s.gone = true
		for _, below := range s.sub {
			mark(below)
		}
	}
	mark(s)
	kept := t.open[:0]
	for _, o := range t.open {
		if o.gone {
			o.shut()
		} else {
			kept = append(kept, o)
		}
	}
	clear(t.open[len(kept):])
	t.open = kept
}

// procPath is a path of a name in a directory for calls that take no descriptor, or none
// opened with O_PATH. The link of proc(5) leads to the directory itself.
func procPath(at int, name string) string {
	return "/proc/self/fd/" + strconv.Itoa(at) + "/" + name
}

package tree

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// maxOpen bounds the directories of one tree that are open at a time.
	maxOpen = 32
	// batch is the number of names read from a directory at a time.
	batch = 256
	// maxLeft bounds the entries of one tree that are remembered because they
	// could not be deleted. Past it the removal ends.
	maxLeft = 1000
	// maxShown bounds the length of a path in an error, in bytes.
	maxShown = 300
)

// LeftError is the error of a removal that had to leave entries in place.
type LeftError struct {
	Dir     string   // the tree
	Mounts  []string // paths relative to Dir of mount points, "." for Dir itself
	Entries int      // all entries that were left, mount points included
	Err     error    // the first error about an entry that is no mount point; nil when there is none
}

// Error implements error.
func (e *LeftError) Error() string {
	var reasons []string
	if len(e.Mounts) > 0 {
		text := fmt.Sprintf("mounted: %q", e.Mounts[:min(len(e.Mounts), 3)])
		if more := len(e.Mounts) - 3; more > 0 {
			text += fmt.Sprintf(" and %d more", more)
		}
		reasons = append(reasons, text)
	}
	if e.Err != nil {
		reasons = append(reasons, e.Err.Error())
	}
	return fmt.Sprintf("remove %s: %d entries were left: %s", e.Dir, e.Entries, strings.Join(reasons, "; "))
}

// Unwrap returns the first error about an entry that is no mount point.
func (e *LeftError) Unwrap() error { return e.Err }

// Remove deletes the tree at path: a directory with everything below it, or any
// other single entry. A tree that does not exist is not an error.
//
// It never crosses a mount point. A mount point stays, with the directories
// above it; everything else is deleted, and the error is a [LeftError]. The same
// holds for an entry that the kernel refuses to delete, such as an immutable
// file. The error is that of ctx when ctx ended first; the rest of the tree
// then stays for another call.
//
// Depth and length of paths are not limited, and no more than 40 descriptors
// are open at a time. Nothing else may rename directories out of the tree
// meanwhile.
func Remove(ctx context.Context, path string) error {
	parent, err := os.OpenFile(filepath.Dir(path), unix.O_DIRECTORY|unix.O_RDONLY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer parent.Close()
	r := remover{ctx: ctx, root: path, top: filepath.Base(path), left: map[int]map[string]bool{}}
	err = r.run(parent)
	r.closeAll()
	switch {
	case err != nil:
		return fmt.Errorf("remove %s: %w", path, err)
	case r.found.Entries > 0:
		r.found.Dir = path
		return &r.found
	}
	return nil
}

// level is a directory on the way from the top of the tree to the directory
// that is being emptied.
type level struct {
	name string
	ino  uint64
	dir  *open // nil while it is closed to bound the descriptors
}

type open struct {
	f       *os.File
	names   []string // read and not handled yet
	deleted bool     // since the directory was read from its beginning
}

type remover struct {
	ctx    context.Context
	root   string
	top    string
	levels []level
	opened int                     // of the levels, the innermost ones
	left   map[int]map[string]bool // by level, the entries that stay
	found  LeftError
}

// errLeft means that an entry stays.
var errLeft = errors.New("left in place")

func (r *remover) run(parent *os.File) error {
	if err := r.entry(parent, r.top); err != nil || len(r.levels) == 0 {
		if errors.Is(err, errLeft) {
			return nil
		}
		return err
	}
	for len(r.levels) > 0 {
		if err := r.ctx.Err(); err != nil {
			return err
		}
		at := len(r.levels) - 1
		dir := r.levels[at].dir
		name, err := dir.next()
		if err != nil {
			return err
		}
		if name != "" {
			if r.left[at][name] {
				continue
			}
			switch err := r.entry(dir.f, name); {
			case errors.Is(err, errLeft):
				if err := r.leave(at, name); err != nil {
					return err
				}
			case err != nil:
				return err
			case len(r.levels) == at+1:
				dir.deleted = true
			}
			continue
		}
		// The end of the directory. An entry may have been missed while
		// others were deleted, so it is read again until nothing changes.
		if dir.deleted {
			dir.deleted = false
			if _, err := dir.f.Seek(0, 0); err != nil {
				return err
			}
			continue
		}
		if err := r.ascend(parent); err != nil {
			return err
		}
	}
	return nil
}

// next returns the next name in the directory, "" at its end.
func (d *open) next() (string, error) {
	if len(d.names) == 0 {
		names, err := d.f.Readdirnames(batch)
		if len(names) == 0 {
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrNotExist) {
				return "", err
			}
			return "", nil
		}
		d.names = names
	}
	name := d.names[len(d.names)-1]
	d.names = d.names[:len(d.names)-1]
	return name, nil
}

// entry deletes an entry that is no directory, or an empty directory, and makes
// a directory that is not empty the next level. It returns errLeft for one that
// stays.
func (r *remover) entry(dir *os.File, name string) error {
	fd := int(dir.Fd())
	err := ignoringEINTR(func() error { return unix.Unlinkat(fd, name, 0) })
	switch {
	case err == nil, errors.Is(err, unix.ENOENT):
		return nil
	case !errors.Is(err, unix.EISDIR):
		return r.note(name, err)
	}
	f, err := openBelow(fd, name)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM):
		return os.NewSyscallError("open", err)
	case err != nil:
		return r.note(name, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return errors.Join(os.NewSyscallError("fstat", err), f.Close())
	}
	r.levels = append(r.levels, level{name: name, ino: st.Ino, dir: &open{f: f}})
	if r.opened++; r.opened > maxOpen {
		oldest := &r.levels[len(r.levels)-r.opened]
		_ = oldest.dir.f.Close() // opened for reading
		oldest.dir = nil
		r.opened--
	}
	return nil
}

// ascend removes the directory that was emptied and goes on with the one above
// it.
func (r *remover) ascend(parent *os.File) error {
	at := len(r.levels) - 1
	l := r.levels[at]
	above := parent
	if at > 0 {
		up := &r.levels[at-1]
		if up.dir == nil {
			f, err := openAbove(l.dir.f, up.ino)
			if err != nil {
				return err
			}
			up.dir = &open{f: f}
			r.opened++
		}
		above = up.dir.f
	}
	_ = l.dir.f.Close() // opened for reading
	r.opened--
	r.levels = r.levels[:at]
	empty := len(r.left[at]) == 0
	delete(r.left, at)
	err := errLeft // what it holds was reported
	if empty {
		err = ignoringEINTR(func() error { return unix.Unlinkat(int(above.Fd()), l.name, unix.AT_REMOVEDIR) })
		switch {
		case err == nil, errors.Is(err, unix.ENOENT):
			if at > 0 {
				r.levels[at-1].dir.deleted = true
			}
			return nil
		}
		err = r.note(l.name, err)
	}
	if at == 0 || !errors.Is(err, errLeft) {
		if errors.Is(err, errLeft) {
			return nil
		}
		return err
	}
	return r.leave(at-1, l.name)
}

// note adds an error about one entry of the innermost level to the result. Errors that
// concern the whole file system end the removal.
func (r *remover) note(name string, err error) error {
	switch {
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EBADF):
		return err
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EXDEV):
		if len(r.found.Mounts) < 10 {
			r.found.Mounts = append(r.found.Mounts, r.path(name))
		}
	case r.found.Err == nil:
		r.found.Err = &os.PathError{Op: "delete", Path: r.path(name), Err: err}
	}
	r.found.Entries++
	return errLeft
}

// leave keeps the removal from handling an entry again.
func (r *remover) leave(at int, name string) error {
	if r.left[at] == nil {
		r.left[at] = map[string]bool{}
	}
	r.left[at][name] = true
	if r.found.Entries > maxLeft {
		return &r.found
	}
	return nil
}

// path returns the path of an entry of the innermost level, relative to the
// tree, shortened in the middle.
func (r *remover) path(name string) string {
	if len(r.levels) == 0 {
		return "."
	}
	names := make([]string, 0, min(len(r.levels), 40))
	for i := range r.levels[1:] {
		if i >= 20 && len(r.levels)-i > 20 {
			continue
		}
		names = append(names, r.levels[i+1].name)
	}
	path := strings.Join(append(names, name), "/")
	if len(path) > maxShown {
		path = path[:maxShown/2] + "[...]" + path[len(path)-maxShown/2:]
	}
	return path
}

func (r *remover) closeAll() {
	for _, l := range slices.Backward(r.levels) {
		if l.dir != nil {
			_ = l.dir.f.Close() // opened for reading
		}
	}
}

func ignoringEINTR(fn func() error) error {
	for {
		if err := fn(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

package tree

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// nameList holds names of one directory with their types, packed: a directory of
// 500,000 names takes 12 MiB of it.
type nameList struct {
	blocks [][]byte // of at most nameBlock bytes
	bytes  int      // in the blocks
	at     []uint32 // where an entry begins: index of the block, offset
}

const nameBlock = 64 << 10

// An entry in a block: its type (DT_*), the length of its name in two bytes, the
// name.
const nameHead = 3

func (l *nameList) add(kind byte, name []byte) {
	n := len(l.blocks)
	if n == 0 || len(l.blocks[n-1])+nameHead+len(name) > nameBlock {
		l.blocks = append(l.blocks, nil)
		n++
	}
	b := l.blocks[n-1]
	l.at = append(l.at, uint32(n-1)<<16|uint32(len(b)))
	b = append(b, kind, byte(len(name)), byte(len(name)>>8))
	l.blocks[n-1] = append(b, name...)
	l.bytes += nameHead + len(name)
}

func (l *nameList) entry(at uint32) (kind byte, name []byte) {
	b := l.blocks[at>>16][at&0xffff:]
	return b[0], b[nameHead : nameHead+int(b[1])+int(b[2])<<8]
}

func (l *nameList) size() int { return l.bytes + 4*len(l.at) }

func (l *nameList) sort() {
	slices.SortFunc(l.at, func(x, y uint32) int {
		_, a := l.entry(x)
		_, b := l.entry(y)
		return bytes.Compare(a, b)
	})
}

// first returns the first entries of a sorted list, as many as take size bytes,
// and at least one.
func (l *nameList) first(size int) *nameList {
	kept := &nameList{}
	for i, at := range l.at {
		if i > 0 && kept.size() > size {
			break
		}
		kept.add(l.entry(at))
	}
	return kept
}

// readNames reads the names of a directory that sort after the given one. A
// list that would take more memory than limit is cut down to its first names,
// and more is true: the others come with another call.
func (t *Tree) readNames(path, after string, limit int, buf []byte) (list *nameList, more bool, err error) {
	fd, err := openDir(path)
	if err != nil {
		return nil, false, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd) // only read from
	if err := t.CheckOpen(fd, path); err != nil {
		return nil, false, err
	}
	list = &nameList{}
	var end []byte // names from here on are not wanted, nil for none
	for {
		n, err := unix.Getdents(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, false, &os.PathError{Op: "getdents64", Path: path, Err: err}
		}
		if n <= 0 {
			break
		}
		for rest := buf[:n]; len(rest) > 0; {
			var kind byte
			var name []byte
			if kind, name, rest = dirent(rest); name == nil || string(name) <= after || end != nil && bytes.Compare(name, end) >= 0 {
				continue
			}
			list.add(kind, name)
			if list.size() > 2*limit {
				list.sort()
				list = list.first(limit)
				_, last := list.entry(list.at[len(list.at)-1])
				end, more = append(bytes.Clone(last), 0), true
			}
		}
	}
	list.sort()
	return list, more, nil
}

// openDir leaves the time of access as it is, if it may.
func openDir(path string) (fd int, err error) {
	for _, flag := range []int{unix.O_NOATIME, 0} {
		for {
			fd, err = unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC|flag, 0)
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
		if !errors.Is(err, unix.EPERM) { // another owner's, in a user namespace
			break
		}
	}
	return fd, err
}

// dirent takes the first struct linux_dirent64 off a buffer (getdents64(2)). The
// name is nil for "." and ".." and for what is no entry.
func dirent(b []byte) (kind byte, name, rest []byte) {
	const head = 19 // d_ino, d_off, d_reclen, d_type
	if len(b) < head {
		return 0, nil, nil
	}
	n := int(binary.NativeEndian.Uint16(b[16:]))
	if n < head || n > len(b) {
		return 0, nil, nil
	}
	name, _, _ = bytes.Cut(b[head:n], []byte{0})
	if binary.NativeEndian.Uint64(b) == 0 || len(name) == 0 || string(name) == "." || string(name) == ".." {
		name = nil
	}
	return b[18], name, b[n:]
}

// Names in memory: those of a directory take half of what others have left, at
// most. What is over it is read by another pass through the directory.
const (
	namesLimit = 24 << 20
	namesLeast = nameBlock / 2
)

// Walk visits the entries of the tree in order: the names of a directory
// sorted by their bytes, and what is below a directory right after it. It calls dir for
// the root, for every directory, and for every entry whose type the file system does
// not report with its name; dir reports whether it is a directory. It calls other for
// everything else. Paths are relative to the root, which is ".".
//
// The walk ends with ctx, with ErrMounted at a mount point, and with the first error of a
// call. Its memory is bounded, however many names a directory has.
func (t *Tree) Walk(ctx context.Context, dir func(rel string) (bool, error), other func(rel string) error) error {
	w := namesWalk{ctx: ctx, tree: t, dir: dir, other: other, buf: make([]byte, 32<<10)}
	if err := w.visit("."); err != nil {
		return err
	}
	return ctx.Err()
}

type namesWalk struct {
	ctx   context.Context
	tree  *Tree
	dir   func(rel string) (bool, error)
	other func(rel string) error
	names int    // bytes of memory for names of the directories on the way
	buf   []byte // for readNames
}

func (w *namesWalk) visit(rel string) error {
	if dir, err := w.dir(rel); err != nil || !dir {
		return err
	}
	path := w.tree.Path(rel)
	for after, more := "", true; more; {
		var list *nameList
		var err error
		if list, more, err = w.tree.readNames(path, after, max((namesLimit-w.names)/2, namesLeast), w.buf); err != nil {
			return err
		}
		w.names += list.size()
		for _, at := range list.at {
			if err := w.ctx.Err(); err != nil {
				return err
			}
			kind, name := list.entry(at)
			child := string(name)
			after = child
			if rel != "." {
				child = rel + "/" + child
			}
			if kind == unix.DT_DIR || kind == unix.DT_UNKNOWN {
				err = w.visit(child)
			} else {
				err = w.other(child)
			}
			if err != nil {
				return err
			}
		}
		w.names -= list.size()
	}
	return nil
}

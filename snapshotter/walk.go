package snapshotter

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
)

// census is what one walk over a layer finds.
type census struct {
	Usage   snapshots.Usage // as containerd counts it: disk blocks, inodes
	Entries int64           // names, with the layer's root
	Bytes   int64           // sizes of regular files, hardlinks once
	Digest  string          // of the metadata of every entry, "sha256:…"
}

// walk counts a layer and digests its metadata: path, type, mode, owner, size,
// modification time, device, link count, link target and xattrs of every entry,
// in lexical order. Content is not read. t, when there is one, sees every entry
// before, and may change it.
func walk(ctx context.Context, root string, t *truth) (census, error) {
	w := walker{root: root, truth: t, hash: sha256.New(), seen: map[inode]struct{}{}}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		return w.visit(ctx, path)
	})
	if err != nil {
		return census{}, err
	}
	w.Usage.Inodes = int64(len(w.seen))
	w.Digest = "sha256:" + hex.EncodeToString(w.hash.Sum(nil))
	return w.census, nil
}

type inode struct{ dev, ino uint64 }

type walker struct {
	census
	root  string
	truth *truth
	hash  hash.Hash
	seen  map[inode]struct{}
	line  bytes.Buffer
}

func (w *walker) visit(ctx context.Context, path string) error {
	st, attrs, err := readEntry(path)
	if err != nil {
		return err
	}
	if w.truth != nil {
		rel, err := filepath.Rel(w.root, path)
		if err != nil {
			return err
		}
		changed, err := w.truth.entry(ctx, path, rel, &st, attrs)
		if err != nil {
			return &untrueError{err}
		}
		if changed {
			if st, attrs, err = readEntry(path); err != nil {
				return err
			}
		}
	}
	w.Entries++
	if id := (inode{st.Dev, st.Ino}); !has(w.seen, id) {
		w.seen[id] = struct{}{}
		// st_blocks counts 512 byte units, whatever the block size (stat(2)).
		w.Usage.Size += st.Blocks * 512
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			w.Bytes += st.Size
		}
	}
	return w.digest(path, &st, attrs)
}

// untrueError is an error of truth: what the layer means is wrong or unknown.
type untrueError struct{ error }

func (e *untrueError) Unwrap() error { return e.error }

// xattr is an extended attribute.
type xattr struct{ name, value string }

func readEntry(path string) (st unix.Stat_t, attrs []xattr, err error) {
	if err := unix.Lstat(path, &st); err != nil {
		return st, nil, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	attrs, err = readXattrs(path)
	return st, attrs, err
}

// readXattrs reads all extended attributes, sorted by name.
func readXattrs(path string) ([]xattr, error) {
	names, err := sysx.LListxattr(path)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "listxattr", Path: path, Err: err}
	}
	slices.Sort(names)
	attrs := make([]xattr, len(names))
	for i, name := range names {
		value, err := sysx.LGetxattr(path, name)
		if err != nil {
			return nil, &os.PathError{Op: "getxattr " + name, Path: path, Err: err}
		}
		attrs[i] = xattr{name, string(value)}
	}
	return attrs, nil
}

func has(m map[inode]struct{}, id inode) bool { _, ok := m[id]; return ok }

// digest adds one entry to the hash. Quoting keeps the fields apart whatever
// bytes a name has.
func (w *walker) digest(path string, st *unix.Stat_t, attrs []xattr) error {
	w.line.Reset()
	fmt.Fprintf(&w.line, "%q %o %d:%d %d.%09d", strings.TrimPrefix(path, w.root), st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		fmt.Fprintf(&w.line, " size=%d nlink=%d", st.Size, st.Nlink)
	case unix.S_IFLNK:
		target, err := os.Readlink(path)
		if err != nil {
			return err
		}
		fmt.Fprintf(&w.line, " link=%q", target)
	case unix.S_IFCHR, unix.S_IFBLK:
		// No link count: containerd and overlay may link whiteouts together.
		fmt.Fprintf(&w.line, " rdev=%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	for _, x := range attrs {
		if _, name, ok := overlayutil.Split(x.name); !ok || !overlayutil.Bookkeeping(name) {
			fmt.Fprintf(&w.line, " %s=%q", x.name, x.value)
		}
	}
	w.line.WriteByte('\n')
	_, err := w.hash.Write(w.line.Bytes())
	return err
}

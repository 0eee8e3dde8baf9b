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
// in lexical order. Content is not read.
func walk(ctx context.Context, root string) (census, error) {
	w := walker{root: root, hash: sha256.New(), seen: map[inode]struct{}{}}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		return w.visit(path)
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
	root string
	hash hash.Hash
	seen map[inode]struct{}
	line bytes.Buffer
}

func (w *walker) visit(path string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: path, Err: err}
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
	return w.digest(path, &st)
}

func has(m map[inode]struct{}, id inode) bool { _, ok := m[id]; return ok }

// digest adds one entry to the hash. Quoting keeps the fields apart whatever
// bytes a name has.
func (w *walker) digest(path string, st *unix.Stat_t) error {
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
	if err := w.xattrs(path); err != nil {
		return err
	}
	w.line.WriteByte('\n')
	_, err := w.hash.Write(w.line.Bytes())
	return err
}

// mutableXattrs are set by the kernel on layers in use, at any time; they say
// nothing of the layer (fs/overlayfs/overlayfs.h).
var mutableXattrs = []string{"origin", "impure", "nlink", "uuid", "upper"}

func (w *walker) xattrs(path string) error {
	names, err := sysx.LListxattr(path)
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "listxattr", Path: path, Err: err}
	}
	slices.Sort(names)
	for _, name := range names {
		space, rest, _ := strings.Cut(name, ".overlay.")
		if (space == "trusted" || space == "user") && slices.Contains(mutableXattrs, rest) {
			continue
		}
		value, err := sysx.LGetxattr(path, name)
		if err != nil {
			return &os.PathError{Op: "getxattr " + name, Path: path, Err: err}
		}
		fmt.Fprintf(&w.line, " %s=%q", name, value)
	}
	return nil
}

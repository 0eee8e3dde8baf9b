package seal

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
)

// MaxEntry is how many bytes the names and values of one entry's extended
// attributes may have together in a tree that is sealed. No layer that
// containerd extracts comes near: an entry's attributes come from one PAX
// header, and archive/tar takes headers of up to 1 MiB only (maxSpecialFileSize
// in its common.go).
const MaxEntry = 4 << 20

// maxRead is the limit for entries that are not being sealed. Seals had lines of
// up to mtree.MaxLine bytes before there was MaxEntry.
const maxRead = mtree.MaxLine

func tooLarge(path string, limit int) error {
	return fmt.Errorf("%s: %w: the names and values of one entry may take %d bytes together; remove some from it", path, mtree.ErrTooLarge, limit)
}

// Xattr is an extended attribute.
type Xattr struct{ Name, Value string }

// recorded reports whether an attribute belongs to a layer. Others belong to the machine,
// and are added and removed without a change of the layer's meaning: labels and
// signatures of security modules, properties that a file system presents as attributes
// (btrfs.*, system.nfs4_acl, ceph.*, and the second names of access control lists on
// xfs, fs/xfs/xfs_xattr.c), and the bookkeeping of overlayfs on layers in use.
func recorded(name string) bool {
	switch name {
	case "security.capability", "system.posix_acl_access", "system.posix_acl_default":
		return true
	}
	if _, mark, ok := overlayutil.Split(name); ok && overlayutil.Bookkeeping(mark) {
		return false
	}
	return strings.HasPrefix(name, "user.") ||
		strings.HasPrefix(name, "trusted.") && !strings.HasPrefix(name, "trusted.SGI_ACL_")
}

// damagesWhenAdded reports whether an attribute that the layer did not have
// changes what the kernel does with the entry. Any other has no effect on it: scanners,
// indexers and backup tools set their own on whole trees.
func damagesWhenAdded(name string) bool {
	_, _, mark := overlayutil.Split(name)
	return mark || recorded(name) && !strings.HasPrefix(name, "user.") && !strings.HasPrefix(name, "trusted.")
}

// values lends buffers for one value: 64 KiB is the most that Linux has
// (XATTR_SIZE_MAX, xattr(7)).
var values = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}

// attributes reads the extended attributes of entries.
type attributes struct {
	all   bool // those too that are not recorded
	limit int  // bytes of names and values of one entry
}

// read returns the attributes of an entry, sorted by name.
func (a attributes) read(path string) (attrs []Xattr, err error) {
	// Attributes may change meanwhile: a relabeling of the file system goes on
	// for hours. One that is gone between listing and reading is read anew.
	for range 100 {
		attrs, err = a.try(path)
		if !errors.Is(err, errChanged) {
			break
		}
	}
	return attrs, err
}

// errChanged wraps no error number: ENODATA of getxattr(2) is no media error.
var errChanged = errors.New("extended attributes change while they are read")

func (a attributes) try(path string) (attrs []Xattr, err error) {
	buf := values.Get().(*[]byte)
	defer values.Put(buf)
	// The kernel allocates a buffer of the same size. For 64 KiB that takes half a microsecond, and nearly no entry
	// has any attributes.
	list := (*buf)[:256]
	n, err := tree.Retry(func() (int, error) { return unix.Llistxattr(path, list) })
	if n == 0 && err == nil {
		return nil, nil
	}
	if errors.Is(err, unix.ERANGE) {
		list = *buf
		n, err = tree.Retry(func() (int, error) { return unix.Llistxattr(path, list) })
	}
	switch {
	case errors.Is(err, unix.ENOTSUP):
		return nil, nil
	case errors.Is(err, unix.E2BIG), errors.Is(err, unix.ERANGE):
		return nil, fmt.Errorf("%s: %w: its names take more than 64 KiB; remove some from it", path, mtree.ErrTooLarge)
	case err != nil:
		return nil, &os.PathError{Op: "listxattr", Path: path, Err: err}
	}
	var names []string
	sum := 0
	for name := range bytes.SplitSeq(list[:n], []byte{0}) {
		if len(name) > 0 && (a.all || recorded(string(name))) {
			names = append(names, string(name))
			sum += len(name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		n, err := tree.Retry(func() (int, error) { return unix.Lgetxattr(path, name, *buf) })
		switch {
		case err != nil && !recorded(name):
			continue // some are listed but cannot be read
		case errors.Is(err, unix.ENODATA):
			return nil, fmt.Errorf("%s: %s: %w", path, name, errChanged)
		case err != nil:
			return nil, &os.PathError{Op: "getxattr " + name, Path: path, Err: err}
		}
		if sum += n; sum > a.limit {
			return nil, tooLarge(path, a.limit)
		}
		attrs = append(attrs, Xattr{name, string((*buf)[:n])})
	}
	return attrs, nil
}

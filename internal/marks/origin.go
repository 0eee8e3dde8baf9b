package marks

import (
	"archive/tar"
	"context"
	"fmt"
	"hash/maphash"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/continuity/fs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
)

// Origin decides which directories of an extracted tree have an entry in the
// tar. The applier invented the others, for something inside them.
//
// The tar itself decides when it was read. Otherwise the evidence is what the
// applier left in the inode, and reading a directory changes none of it. Of a
// directory that has an entry the applier sets owner, mode, xattrs and, as its
// last act, the time of modification. Of an invented one it sets the mode only,
// to 0755 (mkparent, pkg/archive/tar.go:448): its time of modification is the
// kernel's, that of the last change inside.
type Origin struct {
	Dirs  *TarDirs  // nil when the tar was not read
	Since time.Time // the tree is not older
	// Load reads the tar out of the layer's blob; nil when that is not possible,
	// or was tried.
	Load func(ctx context.Context) (*TarDirs, error)
}

type evidence int

const (
	fromTar       evidence = iota // the directory has an entry
	maybeFromTar                  // it seems to have one
	maybeInvented                 // it seems to have none
	invented                      // it has none
)

// of weighs the evidence for one directory. It may be inconclusive: see decide.
func (o *Origin) of(path string, e *seal.Entry) (evidence, error) {
	if o.Dirs != nil {
		return o.Dirs.evidence(e.Path), nil
	}
	// chmod(2) sets exactly these bits, also with an ACL that the directory has
	// inherited. The group may be that of a setgid directory around it.
	if e.Stat.Mode&^unix.S_IFMT != 0o755 || e.Stat.Uid != 0 {
		return fromTar, nil
	}
	var x unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BTIME, &x); err != nil {
		return fromTar, &os.PathError{Op: "statx", Path: path, Err: err}
	}
	t := times{atime: e.Stat.Atim, mtime: e.Stat.Mtim, ctime: e.Stat.Ctim}
	if x.Mask&unix.STATX_BTIME != 0 {
		born := unix.NsecToTimespec(x.Btime.Sec*1e9 + int64(x.Btime.Nsec)) // on 32 bits, too
		t.born = &born
	}
	return t.evidence(o.Since), nil
}

// times of a directory: of access, modification, status change and, where the
// file system keeps it, birth.
type times struct {
	atime, mtime, ctime unix.Timespec
	born                *unix.Timespec
}

// evidence weighs the times of a directory in a tree that is not older than
// since.
//
// The kernel takes both times of a change inside from its clock; for example an
// opaque mark changes only that of status later. A clock with fractions of a
// second does not show a whole one by chance, and tars have whole ones, with few
// exceptions.
func (t times) evidence(since time.Time) evidence {
	// The clock of inodes is coarse, up to a tick late (ktime_get_coarse_real_ts64).
	first := unix.NsecToTimespec(since.Add(-time.Second).UnixNano())
	if t.born != nil {
		first = *t.born
	}
	// 128-byte inodes of ext4 have seconds only, and these prove nothing.
	whole := t.ctime.Nsec == 0
	switch within := !before(t.mtime, first) && !before(t.ctime, t.mtime); {
	case t.mtime == t.ctime && !whole:
		return invented
	case t.mtime.Nsec == 0 && !whole:
		return fromTar
	case within && !whole && t.born != nil && t.atime == *t.born:
		// The applier sets the time of access of an entry, too. That it is another
		// one proves nothing: something may have read the directory.
		return invented
	case within:
		return maybeInvented
	}
	return maybeFromTar // unless the clock was set meanwhile
}

func before(a, b unix.Timespec) bool {
	return a.Sec < b.Sec || a.Sec == b.Sec && a.Nsec < b.Nsec
}

// decide reports whether a directory was invented. Where the evidence is
// inconclusive, it reads the tar. If there is no blob, the probable is taken: an
// entry that has the second of its extraction as its time is rarer than a
// directory without entry.
func (o *Origin) decide(ctx context.Context, rel string, found evidence) (bool, error) {
	if found == fromTar || found == invented {
		return found == invented, nil
	}
	if o.Load != nil {
		dirs, err := o.Load(ctx)
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		if err != nil {
			log.G(ctx).WithError(err).WithField("directory", rel).
				Warn("times do not prove whether directories have entries in the layer's tar, and the tar cannot be read: the probable is taken")
		}
		o.Dirs, o.Load = dirs, nil
	}
	if o.Dirs != nil {
		found = o.Dirs.evidence(rel)
	}
	return found == invented || found == maybeInvented, nil
}

// TarDirs are the directories for which a tar has entries. It keeps hashes of
// their paths: a hostile tar may have millions of long ones.
type TarDirs struct {
	root string // into which the tar is, or was, extracted
	seed maphash.Seed
	set  map[uint64]struct{}
}

// NewTarDirs returns an empty set for a tar that is extracted into root.
func NewTarDirs(root string) *TarDirs {
	return &TarDirs{root: root, seed: maphash.MakeSeed(), set: map[uint64]struct{}{}}
}

// Filter is an [archive.Filter] that accepts everything and records directories.
func (d *TarDirs) Filter(h *tar.Header) (bool, error) {
	if h.Typeflag != tar.TypeDir {
		return true, nil
	}
	// As the applier does: links on the way are followed inside the root, one in
	// the place of the directory is replaced (pkg/archive/tar.go:227).
	parent, base := filepath.Split(filepath.Clean(h.Name))
	parent, err := fs.RootPath(d.root, parent)
	if err != nil {
		return false, fmt.Errorf("directory %q of the tar: %w", h.Name, err)
	}
	path := filepath.Join(parent, filepath.Join("/", base))
	if rel, ok := strings.CutPrefix(path, d.root+"/"); ok {
		d.Add(rel)
	}
	return true, nil
}

// Add records the directory rel.
func (d *TarDirs) Add(rel string) { d.set[maphash.String(d.seed, rel)] = struct{}{} }

// Has reports whether the tar has an entry for the directory rel.
func (d *TarDirs) Has(rel string) bool {
	_, ok := d.set[maphash.String(d.seed, rel)]
	return ok
}

func (d *TarDirs) evidence(rel string) evidence {
	if d.Has(rel) {
		return fromTar
	}
	return invented
}

// Read records the directories of a whole tar.
func (d *TarDirs) Read(r io.Reader) error {
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := d.Filter(h); err != nil {
			return err
		}
	}
}

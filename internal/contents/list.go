package contents

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
)

// Write reads the regular files below root and writes their sizes and
// digests to path, in the format and the order of a seal, each file that has
// several names once. Holes are not read. It returns the digest of that text. The
// file is not synced. A tree with a mount point in it gets no list: see
// tree.ErrMounted.
func Write(ctx context.Context, root, path string, how Reading) (digest string, err error) {
	err = how.run(func() error {
		l, err := newList(root, path, how, nil)
		if err != nil {
			return err
		}
		err = l.walk(ctx)
		digest, err = l.end(err)
		return err
	})
	if err != nil {
		return "", err
	}
	return digest, nil
}

// Known returns the SHA-256 of a file's content by its inode number and size, if the caller
// knows it: it has written the file, and nothing has changed it since.
type Known func(inode uint64, size int64) (sum [sha256.Size]byte, ok bool)

// List is what Write writes, of a tree that the caller walks through.
type List struct {
	root  string
	r     *contentReader
	out   *mtree.Writer
	links links
	known Known // may be nil
	line  []byte
}

// NewList begins a list in a file. Files that are known are not read. files, which may be nil, get the
// file of the list. Close must follow.
func NewList(root, path string, known Known, files *fsync.Files) (*List, error) {
	l, err := newList(root, path, Reading{}, files)
	if err != nil {
		return nil, err
	}
	l.known = known
	return l, nil
}

func newList(root, path string, how Reading, files *fsync.Files) (*List, error) {
	r, err := newContentReader(root, how)
	if err != nil {
		return nil, err
	}
	out, err := mtree.Create(path, files)
	if err != nil {
		r.close()
		return nil, err
	}
	return &List{root: root, r: r, out: out, links: links{}}, nil
}

// Close ends the list, and returns its digest.
func (l *List) Close() (digest string, err error) { return l.end(nil) }

// end is Close after an error, which it returns.
func (l *List) end(err error) (string, error) {
	defer l.r.close()
	digest := l.out.Digest()
	if err := errors.Join(err, l.out.Close()); err != nil {
		return "", err
	}
	return digest, nil
}

// Add adds an entry of the tree, if it is a regular file. Entries come in the order of a seal.
func (l *List) Add(ctx context.Context, rel string, st *unix.Stat_t) error {
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil
	}
	if l.known != nil {
		if sum, ok := l.known(st.Ino, st.Size); ok {
			return l.add(rel, st.Size, false, hex.EncodeToString(sum[:]))
		}
	}
	return l.file(ctx, rel)
}

// walk adds all files. It reads in the goroutine that calls it, whose priority may be lower than
// usual.
func (l *List) walk(ctx context.Context) error {
	t, err := tree.Open(l.root)
	if err != nil {
		return err
	}
	defer t.Close()
	file := func(rel string) error { return l.file(ctx, rel) }
	return t.Walk(ctx, func(rel string) (bool, error) {
		st, err := t.Lstat(rel)
		if err != nil || st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return true, err
		}
		return false, file(rel)
	}, file)
}

func (l *List) file(ctx context.Context, rel string) error {
	var other *notRegular
	c, err := l.r.open(rel)
	if errors.As(err, &other) {
		return nil
	}
	if err != nil {
		return err
	}
	defer c.close()
	holes, err := c.holes(ctx)
	if err != nil {
		return err
	}
	sparse := holes >= sparseHoles
	digest, err := c.once(ctx, sparse, l.links)
	if err != nil {
		return err
	}
	return l.add(rel, c.st.Size, sparse, digest)
}

// add writes the line of a file.
func (l *List) add(rel string, size int64, sparse bool, digest string) error {
	b := mtree.AppendPath(l.line[:0], rel)
	b = strconv.AppendInt(append(b, " type=file size="...), size, 10)
	b = append(b, digestWords[sparse]...)
	b = append(append(b, digest...), '\n')
	l.line = b
	_, err := l.out.Write(b)
	return err
}

// digestWords come before a digest in a line; sparse files have another.
var digestWords = map[bool]string{false: " sha256digest=", true: " tags=sparse-sha256:"}

// links are digests of files that have several names.
type links map[linkKey]*linkDigest

type linkKey struct {
	dev, ino uint64
	sparse   bool
}

type linkDigest struct {
	digest string
	left   uint64 // names that have not come yet
}

// once is digest, but reads a file that has several names only once.
func (c *content) once(ctx context.Context, sparse bool, seen links) (string, error) {
	if c.st.Nlink == 1 {
		return c.digest(ctx, sparse)
	}
	id := linkKey{c.st.Dev, c.st.Ino, sparse}
	if known := seen[id]; known != nil {
		if known.left--; known.left == 0 {
			delete(seen, id)
		}
		return known.digest, nil
	}
	digest, err := c.digest(ctx, sparse)
	if err == nil {
		seen[id] = &linkDigest{digest, uint64(c.st.Nlink) - 1}
	}
	return digest, err
}

// Verify reads the files that are listed in the file path, whose text
// must have the given digest, and returns the first findings, at most limit. A
// file that the disk cannot read is a finding too. Files that are not listed are not:
// package seal verifies which entries exist, and of which type. An error means that
// nothing is known of the tree.
func Verify(ctx context.Context, root, path, digest string, limit int, how Reading) (found []finding.Finding, err error) {
	err = how.run(func() error {
		// Verify all of the list first: reading content takes long, and would be
		// useless if the list is damaged.
		list, err := mtree.Open(path)
		if err != nil {
			return err
		}
		err = list.Check(digest)
		list.Close()
		if err != nil {
			return err
		}
		if list, err = mtree.Open(path); err != nil {
			return err
		}
		defer list.Close()
		r, err := newContentReader(root, how)
		if tree.Missing(err) && tree.Gone(root) {
			found = []finding.Finding{{Path: ".", What: "missing"}}
			return nil
		}
		if err != nil {
			return err
		}
		defer r.close()
		for seen := (links{}); len(found) < limit && list.Next(); list.Take() {
			want, err := parseContent(list.Line())
			if err != nil {
				return fmt.Errorf("%w: %s: %w", mtree.ErrUnsealed, path, err)
			}
			f, err := r.compare(ctx, want, seen)
			if err != nil {
				return err
			}
			if f != nil {
				found = append(found, *f)
			}
		}
		return list.Err()
	})
	if err != nil {
		return nil, err
	}
	return found, nil
}

// contentLine is a line of a list of contents.
type contentLine struct {
	path, digest string
	sparse       bool // which digest it is
	size         int64
}

func parseContent(line []byte) (w contentLine, err error) {
	if w.path, err = mtree.PathOf(line); err != nil {
		return w, err
	}
	_, rest, _ := bytes.Cut(line, []byte(" type=file size="))
	size, sum, ok := bytes.Cut(rest, []byte(digestWords[false]))
	if !ok {
		size, sum, w.sparse = bytes.Cut(rest, []byte(digestWords[true]))
	}
	w.size, err = strconv.ParseInt(string(size), 10, 64)
	w.digest = string(sum)
	if err != nil || len(w.digest) != 64 {
		return w, fmt.Errorf("line of %q is not of a file's content", w.path)
	}
	return w, nil
}

// compare returns the finding of a file that differs from its line, nil for any other.
func (r *contentReader) compare(ctx context.Context, want contentLine, seen links) (*finding.Finding, error) {
	var other *notRegular
	c, err := r.open(want.path)
	switch {
	case errors.As(err, &other):
		return &finding.Finding{Path: want.path, What: "type", Want: "file", Have: other.kind}, nil
	case absent(err):
		return &finding.Finding{Path: want.path, What: "missing"}, nil
	case err == nil:
		defer c.close()
		if c.st.Size != want.size {
			return &finding.Finding{Path: want.path, What: "size", Want: strconv.FormatInt(want.size, 10), Have: strconv.FormatInt(c.st.Size, 10)}, nil
		}
		var have string
		if have, err = c.once(ctx, want.sparse, seen); err == nil {
			if have != want.digest {
				return &finding.Finding{Path: want.path, What: digestName(want.sparse), Want: want.digest, Have: have}, nil
			}
			return nil, nil
		}
	}
	if tree.Unreadable(err) {
		return finding.Unreadable(want.path, err), nil
	}
	return nil, err
}

// digestName is the name of a digest in a finding.
func digestName(sparse bool) string {
	if sparse {
		return "sparse-sha256"
	}
	return "sha256digest"
}

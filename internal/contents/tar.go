package contents

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
)

// VerifyTar compares the content of the regular files below root with that of a
// layer's tar, as it streams by, and returns the first findings, at most limit.
// It reads layer to its end, so that a digest which the caller takes on the way
// is that of all of it.
//
// Only content is compared, and only that of files which are at the place where the tar
// has them; package seal verifies the rest. The steps of the unpacking are not
// reproduced: the same name twice, a name below a link to another directory, in this
// layer or in one below it, a file that a later entry removed. A difference that any of
// these may explain is no finding.
//
// Memory grows only with the number of entries that are not on disk as the tar
// has them.
func VerifyTar(ctx context.Context, root string, layer io.Reader, limit int, how Reading) (found []finding.Finding, err error) {
	err = how.run(func() error {
		r, err := newContentReader(root, how)
		if tree.Missing(err) && tree.Gone(root) {
			found = []finding.Finding{{Path: ".", What: "missing"}}
			return nil
		}
		if err != nil {
			return err
		}
		defer r.close()
		v := tarVerifier{r: r, theirs: make([]byte, chunk), moved: map[moved]struct{}{}}
		if err := v.stream(ctx, tar.NewReader(layer)); err != nil {
			return err
		}
		// A tar ends before its file does.
		if _, err := io.Copy(io.Discard, layer); err != nil {
			return fmt.Errorf("read the layer: %w", err)
		}
		found, err = v.judge(ctx, limit)
		return err
	})
	if err != nil {
		return nil, err
	}
	return found, nil
}

// moved is content that the tar has below a directory that is not in this layer.
// Where its name went through a link in a layer below, it is in a file of the
// same last name elsewhere.
type moved struct {
	base   string
	digest string
}

type tarVerifier struct {
	r      *contentReader
	theirs []byte
	names  names
	moved  map[moved]struct{}
}

// stream compares entry by entry. What is not equal is an open question until
// the end: a later entry may take its place.
func (v *tarVerifier) stream(ctx context.Context, tr *tar.Reader) error {
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("read the layer: %w", err)
		}
		if err := v.entry(ctx, h, tr); err != nil {
			return err
		}
	}
}

func (v *tarVerifier) entry(ctx context.Context, h *tar.Header, body io.Reader) error {
	if len(h.Name) >= unix.PathMax {
		// Such a name cannot be unpacked. Not to be kept: a header has room for
		// a million directories.
		return fmt.Errorf("read the layer: a name of %d bytes", len(h.Name))
	}
	name := v.names.place(path.Clean("/" + h.Name))
	// A name that begins like this removes a name of lower layers, and is not there
	// itself (OCI image-spec, layer.md, "Whiteouts").
	if name == "" || strings.HasPrefix(path.Base(name), ".wh.") {
		return nil
	}
	v.replace(name, h.Typeflag == tar.TypeDir)
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		w, same, err := v.compare(ctx, name, h.Size, body)
		if err == nil && !same {
			v.names.make(name).want = &w
		}
		return err
	case tar.TypeLink:
		// The other name of a file that is as it must be need not be read. But
		// when the first name was given to another file since, only the
		// link has the content that went by.
		if first := v.names.find(v.names.place(h.Linkname)); first != nil {
			n := v.names.make(name)
			n.want, n.link = first.want, first.link
		}
	case tar.TypeSymlink:
		v.names.make(name).link = h.Linkname
	}
	return nil
}

// replace forgets what was at a place before. Directories merge.
func (v *tarVerifier) replace(name string, dir bool) {
	switch n := v.names.find(name); {
	case n == nil:
	case dir:
		n.want, n.link = nil, ""
	default:
		*n = names{}
	}
}

// compare compares a file with its content in the tar. It reads all of that,
// and returns its digest.
func (v *tarVerifier) compare(ctx context.Context, name string, size int64, body io.Reader) (w want, same bool, err error) {
	c, err := v.r.open(name)
	switch {
	case err == nil:
		defer c.close()
		same = c.st.Size == size
	case !absent(err) && !tree.Unreadable(err):
		return w, false, err
	}
	hash := newContentHash(sparseInTar(size))
	for left := size; left > 0; {
		theirs := v.theirs[:min(left, chunk)]
		var ours []byte
		var zeros int64
		if same {
			ours, zeros, err = c.next(ctx, int64(len(theirs)))
			switch {
			case err == nil:
				theirs = theirs[:int64(len(ours))+zeros]
			case tree.Unreadable(err):
				same = false
			default:
				return w, false, err
			}
		} else if err = v.r.spend(ctx, len(theirs)); err != nil {
			return w, false, err
		}
		if _, err := io.ReadFull(body, theirs); err != nil {
			return w, false, fmt.Errorf("read the layer: %w", err)
		}
		hash.write(theirs)
		same = same && (zeros > 0 && isZero(theirs) || zeros == 0 && bytes.Equal(ours, theirs))
		left -= int64(len(theirs))
	}
	w.size, w.digest = size, hash.sum()
	return w, same, nil
}

// sparseInTar reports which digest stands for content of a size. That of sparse
// files takes as long for content that has no zeros, and next to nothing for
// zeros.
func sparseInTar(size int64) bool { return size > 1<<30 }

var errEnough = errors.New("enough findings")

// judge decides the open questions by what is on disk.
func (v *tarVerifier) judge(ctx context.Context, limit int) (found []finding.Finding, err error) {
	v.r.how.Progress = nil // all content has been counted
	if err := v.names.each("", func(name string, w *want) error {
		c, err := v.r.open(name)
		switch {
		case err == nil:
			c.close()
		case absent(err):
			v.moved[moved{path.Base(name), w.hex()}] = struct{}{}
		case !tree.Unreadable(err):
			return err
		}
		return ctx.Err()
	}); err != nil {
		return nil, err
	}
	err = v.names.each("", func(name string, w *want) error {
		if len(found) >= limit {
			return errEnough
		}
		f, err := v.answer(ctx, name, w)
		if f != nil {
			found = append(found, *f)
		}
		return err
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	return found, err
}

// answer returns the finding of a file that differs from its content in the tar, nil for any
// other.
func (v *tarVerifier) answer(ctx context.Context, name string, w *want) (*finding.Finding, error) {
	digest := w.hex()
	c, err := v.r.open(name)
	if absent(err) {
		return nil, nil
	}
	if err == nil {
		defer c.close()
		size := &finding.Finding{Path: name, What: "size", Want: strconv.FormatInt(w.size, 10), Have: strconv.FormatInt(c.st.Size, 10)}
		if c.st.Size != w.size && len(v.moved) == 0 {
			return size, nil
		}
		var have string
		if have, err = c.digest(ctx, sparseInTar(c.st.Size)); err == nil {
			_, elsewhere := v.moved[moved{path.Base(name), have}]
			switch {
			case have == digest || elsewhere:
				return nil, nil
			case c.st.Size != w.size:
				return size, nil
			}
			return &finding.Finding{Path: name, What: digestName(sparseInTar(w.size)), Want: digest, Have: have}, nil
		}
	}
	if tree.Unreadable(err) {
		return finding.Unreadable(name, err), nil
	}
	return nil, err
}

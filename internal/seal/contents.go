package seal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
)

// WriteContents reads the regular files below root and writes their sizes and
// digests to path, in the format and the order of a seal, each file that has
// several names once. It returns the digest of that text. The file is not
// synced.
func WriteContents(ctx context.Context, root, path string, how Reading) (digest string, err error) {
	err = how.run(func() error {
		r, err := newContentReader(root, how)
		if err != nil {
			return err
		}
		defer r.close()
		out, err := create(path)
		if err != nil {
			return err
		}
		w := contentsWriter{r: r, out: out, links: map[inode]string{}}
		// Not Walk: its goroutines would read at the usual priority.
		err = (&lister{ctx: ctx, root: root, send: func(b *batch) error { return w.add(ctx, b.entries) }}).run()
		digest = out.digest()
		return errors.Join(err, out.close())
	})
	if err != nil {
		return "", err
	}
	return digest, nil
}

type contentsWriter struct {
	r     *contentReader
	out   *writer
	links map[inode]string // digests of what has several names
	line  []byte
}

func (w *contentsWriter) add(ctx context.Context, entries []Entry) error {
	for i := range entries {
		if err := w.file(ctx, entries[i].Path); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (w *contentsWriter) file(ctx context.Context, rel string) error {
	var other *notRegular
	c, err := w.r.open(rel)
	if errors.As(err, &other) {
		return nil
	}
	if err != nil {
		return err
	}
	defer c.close()
	digest, err := c.once(ctx, w.links)
	if err != nil {
		return err
	}
	b := appendVis(append(w.line[:0], "./"...), rel)
	b = strconv.AppendInt(append(b, " type=file size="...), c.st.Size, 10)
	b = append(append(append(b, " sha256digest="...), digest...), '\n')
	w.line = b
	_, err = w.out.Write(b)
	return err
}

// once is digest, but reads a file that has several names only once.
func (c *content) once(ctx context.Context, links map[inode]string) (string, error) {
	if c.st.Nlink == 1 {
		return c.digest(ctx)
	}
	id := inode{c.st.Dev, c.st.Ino}
	if known, ok := links[id]; ok {
		return known, nil
	}
	digest, err := c.digest(ctx)
	if err == nil {
		links[id] = digest
	}
	return digest, err
}

// VerifyContents reads the files that are listed in the file path, whose text
// must have the given digest, and returns the first findings, at most limit. A
// file that the disk cannot read is a finding too. Files that are not listed are
// none: whether entries are there and of which type is told by Verify. Without
// the list nothing is known: see ErrUnsealed.
func VerifyContents(ctx context.Context, root, path, digest string, limit int, how Reading) (found []Finding, err error) {
	err = how.run(func() error {
		// All of the list first: to read content takes long, and would be in
		// vain.
		list, err := open(path)
		if err != nil {
			return err
		}
		err = list.check(digest)
		list.close()
		if err != nil {
			return err
		}
		if list, err = open(path); err != nil {
			return err
		}
		defer list.close()
		r, err := newContentReader(root, how)
		if errors.Is(err, fs.ErrNotExist) {
			found = []Finding{{Path: ".", What: "missing"}}
			return nil
		}
		if err != nil {
			return err
		}
		defer r.close()
		for links := (map[inode]string{}); len(found) < limit && list.next(); list.take() {
			want, err := parseContent(list.line)
			if err != nil {
				return fmt.Errorf("%w: %s: %w", ErrUnsealed, path, err)
			}
			f, err := r.compare(ctx, want, links)
			if err != nil {
				return err
			}
			if f != nil {
				found = append(found, *f)
			}
		}
		return list.err
	})
	if err != nil {
		return nil, err
	}
	return found, nil
}

// contentLine is a line of a list of contents.
type contentLine struct {
	path, digest string
	size         int64
}

func parseContent(line []byte) (w contentLine, err error) {
	if w.path, err = pathOf(line); err != nil {
		return w, err
	}
	_, rest, _ := bytes.Cut(line, []byte(" type=file size="))
	size, sum, _ := bytes.Cut(rest, []byte(" sha256digest="))
	w.size, err = strconv.ParseInt(string(size), 10, 64)
	w.digest = string(sum)
	if err != nil || len(w.digest) != 64 {
		return w, fmt.Errorf("line of %q is not of a file's content", w.path)
	}
	return w, nil
}

// compare says in what a file differs from its line, if it does.
func (r *contentReader) compare(ctx context.Context, want contentLine, links map[inode]string) (*Finding, error) {
	var other *notRegular
	c, err := r.open(want.path)
	switch {
	case errors.As(err, &other):
		return &Finding{Path: want.path, What: "type", Want: "file", Have: other.kind}, nil
	case absent(err):
		return &Finding{Path: want.path, What: "missing"}, nil
	case err == nil:
		defer c.close()
		if c.st.Size != want.size {
			return &Finding{want.path, "size", strconv.FormatInt(want.size, 10), strconv.FormatInt(c.st.Size, 10)}, nil
		}
		var have string
		if have, err = c.once(ctx, links); err == nil {
			if have != want.digest {
				return &Finding{want.path, "sha256digest", want.digest, have}, nil
			}
			return nil, nil
		}
	}
	if Unreadable(err) {
		return unreadable(want.path, err), nil
	}
	return nil, err
}

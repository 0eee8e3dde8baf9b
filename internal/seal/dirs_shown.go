package seal

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
)

// Wanted reports whether Shown can be called for a path.
func (d *Dirs) Wanted(rel string) bool {
	i, ok := d.find(rel)
	return ok && d.nodes[i].shown != nodeUnwanted
}

// Shown returns the directory that the lower layers show at a path, with what a
// directory of a higher layer takes over from it: mode, owner, and attributes.
// Found is false when they show none. Calls in the order of a walk are cheap.
//
// A long value is in a seal as its digest, and is read from the disk. The error is
// a LostError when the disk has another one.
func (d *Dirs) Shown(rel string) (e Entry, found bool, err error) {
	i, ok := d.find(rel)
	if !ok || d.nodes[i].shown < 0 {
		return e, false, nil
	}
	s := d.shown[d.nodes[i].shown]
	e = Entry{Path: rel}
	f := fieldsOf([]byte(s.line))
	mode, err := strconv.ParseUint(f.get("mode"), 8, 16)
	uid, uidErr := strconv.ParseUint(f.get("uid"), 10, 32)
	gid, gidErr := strconv.ParseUint(f.get("gid"), 10, 32)
	if err := errors.Join(err, uidErr, gidErr); err != nil {
		return e, false, fmt.Errorf("%w: %q: %w", mtree.ErrUnsealed, s.line, err)
	}
	e.Stat.Mode, e.Stat.Uid, e.Stat.Gid = unix.S_IFDIR|uint32(mode), uint32(uid), uint32(gid)
	for x := f.attr(); x != nil; x = f.attr() {
		value, err := x.full(s.tree, rel)
		if err != nil {
			return e, false, err
		}
		e.Xattrs = append(e.Xattrs, Xattr{x.name, value})
		f.next()
	}
	return e, true, nil
}

// full is the value of an attribute; of one that is a digest, that on disk.
func (a *attrField) full(layer, rel string) (string, error) {
	if !a.digest {
		b, err := base64.StdEncoding.AppendDecode(nil, a.value)
		if err != nil {
			return "", fmt.Errorf("%w: attribute %s: %w", mtree.ErrUnsealed, a.name, err)
		}
		return string(b), nil
	}
	buf := values.Get().(*[]byte)
	defer values.Put(buf)
	file := filepath.Join(layer, rel)
	n, err := tree.Retry(func() (int, error) { return unix.Lgetxattr(file, a.name, *buf) })
	if err != nil && !tree.Missing(err) && !errors.Is(err, unix.ENODATA) {
		return "", &os.PathError{Op: "getxattr " + a.name, Path: file, Err: err}
	}
	if err == nil {
		if sum := sha256.Sum256((*buf)[:n]); hex.EncodeToString(sum[:]) == string(a.value) {
			return string((*buf)[:n]), nil
		}
	}
	return "", &LostError{layer, rel, a.name}
}

// find returns the node of a path.
func (d *Dirs) find(rel string) (i uint32, ok bool) {
	if d.last.d == nil || d.last.done() || mtree.ComparePaths(d.last.path, rel) > 0 {
		d.last = d.first()
	}
	for !d.last.done() {
		order := mtree.ComparePaths(d.last.path, rel)
		switch {
		case order == 0:
			return d.last.i, true
		case order > 0:
			return 0, false
		case d.last.path == "." || strings.HasPrefix(rel, d.last.path+"/"):
			d.last.move(d.last.i + 1)
		default:
			d.last.move(d.nodes[d.last.i].end)
		}
	}
	return 0, false
}

// Compare compares directories of the seal that Dirs was read from with what the
// lower layers show at their paths, as an entry is compared with its seal, and
// returns the first findings, at most limit. counts is called for each directory
// that differs, and reports whether that is a finding.
func (d *Dirs) Compare(file, digest string, limit int, counts func(rel string) (bool, error)) (found []finding.Finding, err error) {
	if len(d.shown) == 0 {
		return nil, nil
	}
	i := -1
	err = eachLine(file, digest, func(rel string, line []byte) (bool, error) {
		if fieldsOf(line).get("type") != mtree.TypeName(unix.S_IFDIR) {
			return true, nil
		}
		if i++; i >= len(d.nodes) {
			return false, nil // another seal: its digest will not match
		}
		shown := d.nodes[i].shown
		if shown < 0 {
			return true, nil
		}
		have, _ := inheritableLine(line)
		more := differences(rel, []byte(d.shown[shown].line), []byte(have))
		if len(more) == 0 {
			return true, nil
		}
		count, err := counts(rel)
		if !count || err != nil {
			return true, err
		}
		for _, f := range more[:min(len(more), limit-len(found))] {
			f.Below = true
			found = append(found, f)
		}
		return len(found) < limit, nil
	})
	return found, err
}

// LostError is about a value that a seal has as a digest only, and that is not on
// disk any more.
type LostError struct {
	Tree string // that of the layer
	Path string // of the directory, relative to it
	Name string // of the extended attribute
}

// Error implements error.
func (e *LostError) Error() string {
	return fmt.Sprintf("attribute %s of %s is not what the seal attests", e.Name, filepath.Join(e.Tree, e.Path))
}

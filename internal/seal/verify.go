package seal

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
)

// Verify compares a tree with the seal in the file path, whose text must have
// the given digest, and returns the first findings, at most limit. It writes
// nothing. differences documents what is compared, and what may change without harm. A
// name that the disk cannot read is a finding and ends the comparison.
//
// An error means that nothing is known of the tree. It wraps mtree.ErrUnsealed when
// the reason is the seal, tree.ErrMounted when a mount covers part of the tree.
func Verify(ctx context.Context, root, path, digest string, limit int) ([]finding.Finding, error) {
	return verify(ctx, root, path, digest, limit, false)
}

// VerifyIdle is Verify at idle I/O priority.
func VerifyIdle(ctx context.Context, root, path, digest string, limit int) ([]finding.Finding, error) {
	return verify(ctx, root, path, digest, limit, true)
}

func verify(ctx context.Context, root, path, digest string, limit int, idle bool) ([]finding.Finding, error) {
	seal, err := mtree.Open(path)
	if err != nil {
		return nil, err
	}
	defer seal.Close()
	v := verifier{seal: seal, limit: limit}
	w := walker{idle: idle, attrs: attributes{limit: maxRead}}
	err = w.walk(ctx, root, v.compare)
	switch {
	case err == nil:
		for seal.Next() && v.room() {
			v.missing()
		}
	case errors.Is(err, errEnough), seal.Err() != nil:
	case tree.Missing(err) && tree.Gone(root):
		v.add(".", "missing", "", "")
	default:
		f := v.unreadable(root, err)
		if f == nil {
			return nil, err
		}
		v.found = append(v.found, *f)
	}
	// A damaged seal is no evidence against the tree.
	if err := seal.Check(digest); err != nil {
		return nil, err
	}
	return v.found, nil
}

// unreadable is the finding of an error that a walk ended with, nil when it
// proves nothing.
func (v *verifier) unreadable(root string, err error) *finding.Finding {
	var path *os.PathError
	if !errors.As(err, &path) || !tree.Unreadable(tree.Evidence(err, filepath.Dir(root))) {
		return nil
	}
	rel, relErr := filepath.Rel(root, path.Path)
	if relErr != nil {
		return nil
	}
	return finding.Unreadable(rel, err)
}

var errEnough = errors.New("enough findings")

type verifier struct {
	seal  *mtree.Reader
	limit int
	found []finding.Finding
}

func (v *verifier) room() bool { return len(v.found) < v.limit }

func (v *verifier) add(path, what, want, have string) {
	v.found = append(v.found, finding.Finding{Path: path, What: what, Want: want, Have: have})
}

// compare takes entries of the tree, in order, and as many lines of the seal.
func (v *verifier) compare(entries []Entry, lines []byte) error {
	for _, e := range entries {
		end := bytes.IndexByte(lines, '\n')
		line := lines[:end]
		lines = lines[end+1:]
		if err := v.entry(e.Path, line); err != nil {
			return err
		}
	}
	return nil
}

func (v *verifier) entry(path string, line []byte) error {
	for v.seal.Next() {
		if bytes.Equal(v.seal.Line(), line) {
			v.seal.Take()
			return nil
		}
		sealed, err := mtree.PathOf(v.seal.Line())
		if err != nil {
			return err
		}
		order := mtree.ComparePaths(sealed, path)
		if order > 0 {
			break
		}
		if order == 0 {
			v.differ(path, v.seal.Line(), line)
			v.seal.Take()
			return v.enough()
		}
		v.missing()
		if err := v.enough(); err != nil {
			return err
		}
	}
	if err := v.seal.Err(); err != nil {
		return err
	}
	v.add(path, "extra", "", "")
	return v.enough()
}

func (v *verifier) enough() error {
	if v.room() {
		return nil
	}
	return errEnough
}

// missing reports the entry of the seal's next line.
func (v *verifier) missing() {
	if path, err := mtree.PathOf(v.seal.Line()); err == nil {
		v.add(path, "missing", "", "")
	}
	v.seal.Take()
}

// differ adds in what two lines of one path differ.
func (v *verifier) differ(path string, want, have []byte) {
	for _, f := range differences(path, want, have) {
		if v.room() {
			v.found = append(v.found, f)
		}
	}
}

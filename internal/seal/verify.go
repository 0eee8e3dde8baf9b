package seal

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Finding is a difference between a tree and its seal.
type Finding struct {
	Path string `json:"path"`           // relative to the tree, "." for its root
	What string `json:"what"`           // missing, extra, unreadable, or the mtree keyword that differs
	Want string `json:"want,omitempty"` // by the seal
	Have string `json:"have,omitempty"` // on disk
}

func (f Finding) String() string {
	switch f.What {
	case "missing", "extra":
		return fmt.Sprintf("%s: %s", f.Path, f.What)
	case "unreadable":
		return fmt.Sprintf("%s: unreadable: %s", f.Path, f.Have)
	}
	return fmt.Sprintf("%s: %s was %s, is %s", f.Path, f.What, orNone(f.Want), orNone(f.Have))
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// Verify compares a tree with the seal in the file path, whose text must have
// the given digest, and returns the first findings, at most limit. It writes
// nothing. Without a seal nothing is known of the tree: see ErrUnsealed.
func Verify(ctx context.Context, root, path, digest string, limit int) ([]Finding, error) {
	return verify(ctx, root, path, digest, limit, Reading{})
}

// VerifyIdle is Verify at idle I/O priority.
func VerifyIdle(ctx context.Context, root, path, digest string, limit int) ([]Finding, error) {
	return verify(ctx, root, path, digest, limit, Reading{Idle: true})
}

func verify(ctx context.Context, root, path, digest string, limit int, how Reading) ([]Finding, error) {
	seal, err := open(path)
	if err != nil {
		return nil, err
	}
	defer seal.close()
	v := verifier{seal: seal, limit: limit}
	switch err := walk(ctx, root, nil, how, v.compare); {
	case err == nil:
		for seal.next() && v.room() {
			v.missing()
		}
	case errors.Is(err, errEnough):
	case errors.Is(err, fs.ErrNotExist) && !exists(root):
		v.add(".", "missing", "", "")
	default:
		return nil, err
	}
	// A damaged seal must not make the tree look damaged.
	if err := seal.check(digest); err != nil {
		return nil, err
	}
	return v.found, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

var errEnough = errors.New("enough findings")

type verifier struct {
	seal  *reader
	limit int
	found []Finding
}

func (v *verifier) room() bool { return len(v.found) < v.limit }

func (v *verifier) add(path, what, want, have string) {
	v.found = append(v.found, Finding{Path: path, What: what, Want: want, Have: have})
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
	for v.seal.next() {
		if bytes.Equal(v.seal.line, line) {
			v.seal.take()
			return nil
		}
		sealed, err := pathOf(v.seal.line)
		if err != nil {
			return err
		}
		order := comparePaths(sealed, path)
		if order > 0 {
			break
		}
		if order == 0 {
			v.differ(path, v.seal.line, line)
			v.seal.take()
			return v.enough()
		}
		v.missing()
		if err := v.enough(); err != nil {
			return err
		}
	}
	if err := v.seal.err; err != nil {
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
	if path, err := pathOf(v.seal.line); err == nil {
		v.add(path, "missing", "", "")
	}
	v.seal.take()
}

// differ says in what two lines of one path differ. What does not matter after
// a change of type is left out.
func (v *verifier) differ(path string, want, have []byte) {
	w, h := keywords(want), keywords(have)
	if w["type"] != h["type"] {
		v.add(path, "type", w["type"], h["type"])
		return
	}
	var keys []string
	for k := range w {
		keys = append(keys, k)
	}
	for k := range h {
		if _, both := w[k]; !both {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	for _, k := range keys {
		if w[k] != h[k] && v.room() {
			v.add(path, k, w[k], h[k])
		}
	}
}

// keywords takes a line apart, for people: values of xattrs are quoted text.
func keywords(line []byte) map[string]string {
	m := map[string]string{}
	for _, field := range strings.Fields(string(line))[1:] {
		key, value, _ := strings.Cut(field, "=")
		if strings.HasPrefix(key, "xattr.") {
			if decoded, err := base64.StdEncoding.DecodeString(value); err == nil {
				value = strconv.Quote(string(decoded))
			}
		}
		if plain, err := unvis(key); err == nil {
			key = plain
		}
		m[key] = value
	}
	return m
}

// pathOf returns the path that a line is about.
func pathOf(line []byte) (string, error) {
	word, _, _ := bytes.Cut(line, []byte(" "))
	path, err := unvis(string(word))
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrUnsealed, err)
	}
	rel, ok := strings.CutPrefix(path, "./")
	if !ok && path != "." {
		return "", fmt.Errorf("%w: path %q", ErrUnsealed, path)
	}
	return rel, nil
}

// comparePaths is the order of a seal: a directory comes right before what is
// in it, so a slash sorts before every other byte.
func comparePaths(a, b string) int {
	if a == "." || b == "." {
		switch {
		case a == b:
			return 0
		case a == ".":
			return -1
		}
		return 1
	}
	for i := range min(len(a), len(b)) {
		switch x, y := a[i], b[i]; {
		case x == y:
		case x == '/':
			return -1
		case y == '/' || x > y:
			return 1
		default:
			return -1
		}
	}
	return len(a) - len(b)
}

package contents

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"path"
	"slices"
	"strings"
)

// names are the entries of a tar so far, as far as they matter later: the symbolic
// links, because names below them mean other names, and the files that were not
// found as the tar has them. The zero value holds the root.
type names struct {
	link    string // target, of a symbolic link
	want    *want  // content that the file does not have
	entries map[string]*names
}

// want is the content that the tar has for a file.
type want struct {
	size   int64
	digest [sha256.Size]byte
}

func (w *want) hex() string { return hex.EncodeToString(w.digest[:]) }

// maxLinks is how many links containerd follows for one name.
const maxLinks = 255

// place is the path that a name in the tar stands for, "" for the root: links
// that the tar itself has made are followed, but for the last part.
func (n *names) place(name string) string {
	dir, base := path.Split(name)
	var (
		done  string
		rest  = parts(dir)
		links int
	)
	for len(rest) > 0 && links <= maxLinks {
		part := rest[0]
		rest = rest[1:]
		switch part {
		case ".":
			continue
		case "..":
			done = strings.TrimPrefix(path.Dir("/"+done), "/")
			continue
		}
		next := path.Join(done, part)
		at := n.find(next)
		if at == nil || at.link == "" {
			done = next
			continue
		}
		links++
		if path.IsAbs(at.link) {
			rest = append(parts(at.link), rest...)
		} else {
			// Lexically, as containerd does it (continuity's fs.RootPath): a
			// link a to a/../b is one to b.
			rest = append(parts(path.Join("/", done, at.link)), rest...)
		}
		done = ""
	}
	return strings.TrimPrefix(path.Join("/", done, base), "/")
}

// parts are the names in a path.
func parts(name string) []string {
	return strings.FieldsFunc(name, func(c rune) bool { return c == '/' })
}

func (n *names) find(name string) *names {
	for part := range strings.SplitSeq(name, "/") {
		if n = n.entries[part]; n == nil {
			return nil
		}
	}
	return n
}

// make returns the node of a name.
func (n *names) make(name string) *names {
	for part := range strings.SplitSeq(name, "/") {
		next := n.entries[part]
		if next == nil {
			if n.entries == nil {
				n.entries = map[string]*names{}
			}
			next = &names{}
			n.entries[part] = next
		}
		n = next
	}
	return n
}

// each calls fn for every file that was not found as the tar has it, at and
// below n, in the order of a seal.
func (n *names) each(name string, fn func(name string, w *want) error) error {
	if n.want != nil {
		if err := fn(name, n.want); err != nil {
			return err
		}
	}
	for _, part := range slices.Sorted(maps.Keys(n.entries)) {
		if err := n.entries[part].each(path.Join(name, part), fn); err != nil {
			return err
		}
	}
	return nil
}

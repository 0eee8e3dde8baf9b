package mtree

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

var typeNames = map[uint32]string{
	unix.S_IFREG: "file", unix.S_IFDIR: "dir", unix.S_IFLNK: "link", unix.S_IFCHR: "char",
	unix.S_IFBLK: "block", unix.S_IFIFO: "fifo", unix.S_IFSOCK: "socket",
}

// TypeName is the value of the keyword type for a file with this mode.
func TypeName(mode uint32) string { return typeNames[mode&unix.S_IFMT] }

// AppendVis appends a name. Every byte that has a meaning in mtree is written as \ooo
// (vis(3) with VIS_OCTAL).
func AppendVis(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || strings.IndexByte(`\#=*?[`, c) >= 0 {
			b = append(b, '\\', '0'+c>>6, '0'+c>>3&7, '0'+c&7)
		} else {
			b = append(b, c)
		}
	}
	return b
}

// Unvis is the inverse of AppendVis.
func Unvis(s string) (string, error) {
	if strings.IndexByte(s, '\\') < 0 {
		return s, nil
	}
	var b []byte
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' {
			b = append(b, s[i])
			continue
		}
		if i+4 > len(s) {
			return "", fmt.Errorf("name %q: cut short", s)
		}
		c, err := strconv.ParseUint(s[i+1:i+4], 8, 8)
		if err != nil {
			return "", fmt.Errorf("name %q: %w", s, err)
		}
		b = append(b, byte(c))
		i += 3
	}
	return string(b), nil
}

// AppendPath appends the first word of a line: the path of an entry, relative to the
// root, which is ".".
func AppendPath(b []byte, rel string) []byte {
	if rel == "." {
		return append(b, '.')
	}
	return AppendVis(append(b, "./"...), rel)
}

// PathOf returns the path in a line, the inverse of AppendPath. A path that no walk has, such
// as one that leads out of the tree, is refused: what is opened by it is not in the layer.
func PathOf(line []byte) (string, error) {
	word, _, _ := bytes.Cut(line, []byte(" "))
	path, err := Unvis(string(word))
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrUnsealed, err)
	}
	if path == "." {
		return path, nil
	}
	rel, ok := strings.CutPrefix(path, "./")
	if !ok || strings.IndexByte(rel, 0) >= 0 {
		return "", fmt.Errorf("%w: path %q", ErrUnsealed, path)
	}
	for name := range strings.SplitSeq(rel, "/") {
		if name == "" || name == "." || name == ".." {
			return "", fmt.Errorf("%w: path %q", ErrUnsealed, path)
		}
	}
	return rel, nil
}

// ComparePaths is the order of the lines: a directory comes right before what is
// in it, so a slash sorts before every other byte.
func ComparePaths(a, b string) int {
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

package seal

import (
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/internal/mtree"
	"github.com/durable-snapshotter/durable-snapshotter/overlayutil"
)

// Inheritable reports whether an extended attribute of a directory is one that a
// directory of a higher layer takes over. The marks of overlayfs belong to their
// layer, what is not recorded in a seal belongs to the machine, and labels of
// security modules are set by these themselves.
func Inheritable(name string) bool {
	_, _, mark := overlayutil.Split(name)
	return recorded(name) && !mark && !strings.HasPrefix(name, "security.")
}

// inheritableLine is the line of a directory with nothing in it but what a
// directory of a higher layer takes over, and the root's path. Digests reports
// that it has digests in the place of values.
func inheritableLine(line []byte) (text string, digests bool) {
	f := fieldsOf(line)
	b := append([]byte{}, ". type=dir"...)
	for _, key := range []string{"mode", "uid", "gid"} {
		b = append(append(append(append(b, ' '), key...), '='), f.get(key)...)
	}
	for x := f.attr(); x != nil; x = f.attr() {
		if Inheritable(x.name) {
			word := " xattr."
			if x.digest {
				word, digests = " xattrdigest.", true
			}
			b = append(append(mtree.AppendVis(append(b, word...), x.name), '='), x.value...)
		}
		f.next()
	}
	return string(b), digests
}

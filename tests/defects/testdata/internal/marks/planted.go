// Package marks with planted defects: those that are too long for an edit, see tests/defects.
// go build -overlay adds this file to the package.
package marks

import (
	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/internal/seal"
)

// shownOnDisk is shown, but reads the trees of the parents, whatever has become of them.
func (n *Normalizer) shownOnDisk(rel string) (_ attributes, found bool, err error) {
	path, err := n.stack().Lookup(rel)
	if err != nil || path == "" {
		return attributes{}, false, err
	}
	e, err := seal.Read(path, rel)
	if err != nil || e.Type() != unix.S_IFDIR {
		return attributes{}, false, err
	}
	return attributesOf(&e), true, nil
}

package overlay

import (
	"path"
	"slices"
)

// stockView is what the built-in overlay snapshotter is known to show: the
// reference, with its known deviations put in. Each has a name in the table of
// TestNamedDeviations.
func stockView(img image, parallel bool) (view, error) {
	uppers, err := unpacked(img, parallel)
	if err != nil {
		return view{}, err
	}
	root := newDirectory()
	for i, l := range img {
		if i > 0 {
			// The kernel ignores an opaque mark on the root of a layer.
			l = slices.DeleteFunc(slices.Clone(l), func(e entry) bool { return e.kind == opaque && e.path == "." })
		}
		root.apply(l)
		for name, m := range uppers[i] {
			if m.implied {
				// Unpacked in parallel, a directory without an entry is always 0755
				// root:root. Sequentially, it is given what the first lower layer
				// has, although a layer between, or this one, may hide that.
				n := root.find(name)
				n.Mode, n.Uid, n.Gid, n.Xattrs = m.Mode, m.Uid, m.Gid, m.Xattrs
			}
		}
	}
	return root.view(), nil
}

// phantom reports whether a name that is listed and not found can be the
// whiteout of a directory that is not merged. The kernel lists such a directory
// without a search for whiteouts in it (ovl_dir_is_real in fs/overlayfs/readdir.c);
// a lookup of a name finds it absent, as it should.
func phantom(img image, name string) bool {
	for _, l := range slices.Backward(img) {
		has, removes := false, false
		for _, e := range l {
			removes = removes || e.kind == whiteout && e.path == name
			has = has || below(e.path, path.Dir(name)) || e.path == path.Dir(name)
		}
		if has {
			return removes
		}
	}
	return false
}

package seal

import "github.com/durable-snapshotter/durable-snapshotter/internal/finding"

// differences returns in what an entry differs from its line in the seal, as far
// as it changes what the layer means. What does not matter after a change of
// type is left out.
//
// Compared are the type, the mode, the owner, the size of files, the target of
// symbolic links, the number of devices, the time of modification, and the
// attributes that recorded names. Three things are not, because programs change
// them that leave a layer as it is:
//
//   - Link counts, which older seals have. A copy made with cp -al has links of
//     its own to the files of a layer. Nor is compared which names of the layer
//     are one file: rsync without -H parts them and hardlink(1) unites equal
//     ones, and readers see no difference. A link that is lost is a missing name.
//   - Fractions of a second. GNU tar in its default format loses them, and so
//     does ext4 with inodes of 128 bytes. No damage moves a time by less than a
//     second.
//   - Times of directories and whiteouts. The kernel moves the time of a
//     directory when a name comes or goes, also the temporary name of
//     hardlink(1) or e4defrag(8), and the names themselves are compared one by
//     one. A directory that had no entry in the layer's tar has the time of its
//     extraction anyway. Nothing shows the time of a whiteout.
//
// An attribute that the layer did not have is one for damagesWhenAdded.
func differences(path string, want, have []byte) (found []finding.Finding) {
	w, h := fieldsOf(want), fieldsOf(have)
	add := func(what, want, have string) {
		if want != have {
			found = append(found, finding.Finding{Path: path, What: what, Want: want, Have: have})
		}
	}
	if w.get("type") != h.get("type") {
		add("type", w.get("type"), h.get("type"))
		return found
	}
	for _, key := range []string{"mode", "uid", "gid", "size", "link", "device"} {
		add(key, w.get(key), h.get(key))
	}
	if wt, ht := w.get("time"), h.get("time"); !w.untimed() && seconds(wt) != seconds(ht) {
		add("time", wt, ht)
	}
	for {
		x, y := w.attr(), h.attr()
		switch {
		case x == nil && y == nil:
			return found
		case y == nil || x != nil && x.name < y.name:
			if recorded(x.name) {
				add("xattr."+x.name, x.text(), "")
			}
			w.next()
		case x == nil || y.name < x.name:
			if damagesWhenAdded(y.name) {
				add("xattr."+y.name, "", y.text())
			}
			h.next()
		default:
			if recorded(x.name) && !x.equal(y) {
				found = append(found, finding.Finding{Path: path, What: "xattr." + x.name, Want: x.text(), Have: y.text()})
			}
			w.next()
			h.next()
		}
	}
}

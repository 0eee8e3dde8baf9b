// Package seal records the entries of a directory tree with their attributes, and
// verifies later whether the tree still matches the record.
//
// A seal is a text in the format of package mtree: a line per entry with its path,
// type, mode, owner, time of modification, size, device number, link target and
// extended attributes. Content is not part of it: its digests are a list of their
// own, see package contents.
//
//	Write           tree ──▶ seal, and what was counted on the way
//	ChangeAndWrite  the same, of a tree that is changed on the way
//	Verify          tree and seal ──▶ findings
//
//	ListDirs    tree ──▶ its directories
//	Dirs.Below  directories and seals of lower layers ──▶ what a mount shows at their paths
//
// Extended attributes are written as xattr.<name>=<base64>, the keyword of
// go-mtree, and long ones as xattrdigest.<name>=<hex>; the other keywords are
// those of mtree(8), which can check a seal when they are taken out. Only what
// belongs to the layer is recorded, and less than that is compared: what
// programs do to every file of a machine is no damage (see differences).
//
// No walk crosses a mount point (tree.ErrMounted), and memory is bounded whatever the
// tree holds: an entry with more extended attributes than MaxEntry is refused
// (mtree.ErrTooLarge).
//
// Three results are distinguished. A finding is a difference that was seen.
// mtree.ErrUnsealed means that the seal itself is known to be lost. Any other error
// means that nothing could be examined, and is no evidence of anything.
package seal

// Package marks makes the tree of a layer mean to overlayfs what the layer's tar
// meant, while the walk of a Commit or of a heal sees each entry.
//
// overlayfs reads marks in a layer: extended attributes and devices 0:0. Which marks the
// applier has written depends on how a layer was unpacked, and how the kernel interprets
// them depends on the mount; docs/overlayfs.md has the rules and their reasons.
//
//   - normalizer.go: [Normalizer], a seal.Change, changes marks of each entry where they mean
//     something else than the tar.
//   - inherit.go: directories that no entry of the tar made get the attributes
//     that the parent chain shows for them.
//   - origin.go: which directories those are, by their times or by the tar.
//   - below.go: reads the parent chain, by the seals of its layers. What only the
//     database and the state of the layers know comes in as a [Chain].
//   - inherited.go: compares a committed layer with what it must have inherited.
//   - relabel.go: security labels of a healed tree.
//
// The package does not depend on the database, the locks of the snapshotter, or the states
// of layers. It changes nothing but the tree that it was given, and syncs nothing:
// the caller's sync covers it.
package marks

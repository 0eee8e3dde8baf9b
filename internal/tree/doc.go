// Package tree reads and deletes directory trees that containers have made, and in which
// other programs may have mounted something. Neither crosses a mount point.
//
// [Open] is for reading: [Tree.Walk] visits what belongs to a tree, in bounded memory,
// and [ErrMounted] is its error at a mount point. [Missing], [Unreadable] and [Evidence]
// classify what reading may fail with, by whether it proves anything about the file.
//
// [Remove] differs from os.RemoveAll in three ways: it never crosses a mount
// point, it needs a bounded number of descriptors whatever the depth of the
// tree is, and it ends when its context does.
package tree

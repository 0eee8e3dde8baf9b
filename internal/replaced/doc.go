// Package replaced has the trees that lie beside snapshots/: those that a heal has
// put aside, and those that are being deleted.
//
//	healing/   a layer that is extracted again; after the exchange, the damaged tree
//	replaced/  a damaged tree that mounts may still use
//	removing/  a tree without a row, which nothing uses and which is deleted
//
// A heal exchanges two directories. Overlay mounts that existed before go on
// reading the damaged tree, because they hold its inodes, and deleting it would take
// files from running containers. So it is kept in replaced/ until no mount can use
// it, at the latest until the machine boots: the boot is part of its name.
//
// # When a replaced tree is deleted
//
// After an exchange no property of an overlay mount shows which of the two trees it
// uses. All overlay mounts that name the layer a short time after it count as users,
// unless they write to a snapshot that was prepared later; they are noted in the
// tree. Where this process cannot see all mounts of the machine, the active
// snapshots and views of that time count as well. What cannot be decided keeps the
// tree.
//
// # Writes
//
// [Trees.Keep] makes a directory and goes through the gate. Everything else is
// renamed and deleted without a sync: after a power cut the tree lies in one of the
// three directories, and [Trees.Settle] decides again.
//
// # Locks
//
//	sweeping  one pass over replaced/ at a time
//	deleting  one deletion of trees at a time
//
// Neither is taken while the other is held. A caller of Sweep or Delete may hold the
// lock of a key, and no other.
package replaced

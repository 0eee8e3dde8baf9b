// Package snapshotter is containerd's overlay snapshotter with an order: what it
// acknowledges is on disk.
//
// # What is ours and what is containerd's
//
// [Snapshotter] holds a snapshotter of github.com/containerd/containerd/v2/
// plugins/snapshots/overlay, with our database below it, and adds the
// difference. Prepare and View delegate and make the new directories durable
// inside the same transaction. Commit is ours. Remove delegates and deletes
// afterwards. Stat, Update, Usage, Mounts and Walk delegate; Stat, Mounts,
// Prepare and View wait until the layers they speak of are known to be whole.
//
// # The life of a layer
//
//	Prepare  mkdir new-*/{fs,work}, rename to <id>      overlay, in the transaction
//	         open the cursor on the file system
//	         write <id>/record, fsync record, fs, work, <id>, snapshots/
//	         transaction commits {row, open journal entry}
//	apply    containerd writes into <id>/fs
//	Commit   walk <id>/fs: marks in order (internal/marks), usage, <id>/seal
//	         write <id>/record
//	         syncfs on the cursor
//	         transaction {committed row, journal entry closed}
//	Remove   transaction {row gone, entry to the history}
//	         rename <id> to removing/, delete it there
//
// # Promises
//
//   - I1: a Commit that returns nil is on disk. The order above buys it; each
//     step names the reason.
//   - I2: Stat, Prepare, View and Mounts answer for a committed snapshot when
//     internal/layers knows that it is whole, with all below it. After an unclean
//     shutdown nothing is known; layers are verified, and healed when they are
//     damaged, before they are answered for.
//   - I4: after an error of a sync or of a transaction this snapshot, and every
//     other one that was active at that time, can never be committed. Nothing
//     is retried. While the file system takes no writes the snapshotter answers
//     Unavailable, and [Config.OnHealth] hears of it.
//   - I5: a directory below snapshots/ whose name is a number or new-* has a row
//     or is removed; one with a row is never removed, and what is mounted in one
//     neither. Rows go first, directories after, and a directory is
//     moved out of the way of its number before it is deleted.
//
// A snapshot is an extraction when a layer is unpacked into it; containerd marks it
// so with a label or with the form of the key. An extraction that was open when
// the daemon ended cannot be committed: its cursor is gone, and with it the
// knowledge of what the disk could not write. Other active snapshots
// (containers) can, and the journal records that the cursor was lost.
//
// Package internal/layout has what lies where below the root, internal/replaced the
// trees that a heal has put aside and those that are being deleted.
//
// # Concurrency and lock order
//
// A Snapshotter may be used from many goroutines. Locks, outermost first:
//
//	keys      one operation per key
//	creating  one Prepare, View or move to removing/ at a time
//	          (here the locks of package gate)
//	actives   the active snapshots (internal/active), short
//	          (here the locks of package layers)
//
// The walk of a Commit and the deletion of trees run outside all of them but
// keys.
package snapshotter

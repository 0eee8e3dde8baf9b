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
//	Commit   walk <id>/fs: marks in order (truth.go), usage, <id>/seal
//	         write <id>/record
//	         syncfs on the cursor
//	         transaction {committed row, journal entry closed}
//	Remove   transaction {row gone, entry to the history}
//	         rename <id> to removing/, delete it there
//
// # Promises
//
//   - I1: a Commit that returns nil is on disk. The order above buys it; each
//     step says where.
//   - I2: a committed snapshot is ready, unverified, damaged or healing
//     (readiness.go). After a boot that followed no clean stop (run.go) all are
//     unverified, and looked at before they are spoken of, or in the background
//     (attend.go, check.go). What is damaged is extracted again from its blob
//     under the same name (heal.go, swap.go), or refused.
//   - I4: after an error of a sync or of a transaction this snapshot, and every
//     other one that was active at that time, can never be committed. Nothing
//     is retried. While the file system takes no writes the snapshotter answers
//     Unavailable, and [Config.OnHealth] hears of it.
//   - I5: a directory below snapshots/ has a row or is removed; one with a row
//     is never removed. Rows go first, directories after, and a directory is
//     moved out of the way of its number before it is deleted.
//
// A snapshot is an extraction when a layer is unpacked into it; containerd says
// so with a label or with the form of the key. An extraction that was open when
// the daemon ended cannot be committed: its cursor is gone, and with it the
// knowledge of what the disk could not write. Other active snapshots
// (containers) can, and the journal says that the cursor was lost.
//
// # On disk
//
//	<root>/metadata.db        package storage
//	<root>/snapshots/<id>/fs      the layer
//	<root>/snapshots/<id>/work    overlay's work directory, active snapshots
//	<root>/snapshots/<id>/record  what a lost metadata.db is rebuilt from
//	<root>/snapshots/<id>/seal    what the layer was (package internal/seal)
//	<root>/snapshots/<id>/contents  digests of its content, added later (contents.go)
//	<root>/healing/<id>/          a layer being extracted again
//	<root>/replaced/              damaged trees that mounts of this boot may use
//	<root>/removing/              directories without a row, being deleted
//	<root>/set-aside/             what a rebuild could not explain
//	<root>/empty/                 lower directory of extractions without a parent
//
// # Concurrency and lock order
//
// A Snapshotter may be used from many goroutines. Locks, outermost first:
//
//	keys      one operation per key
//	creating  one Prepare, View or move to removing/ at a time
//	syncing   one syncfs and its transaction at a time
//	saying    one writing of what looks have found at a time
//	trouble   what is left to do after a failed write; held while that is tried
//	mu        the map of active snapshots, short
//	ready.mu  what is known of committed snapshots, short
//
// The walk of a Commit and the deletion of trees run outside all of them but
// keys. Looking at layers and extracting them again runs outside all of them;
// the exchange of trees takes keys and syncing, as a Commit does.
package snapshotter

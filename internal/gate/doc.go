// Package gate is the only way to write below a root: one door for every sync and
// every transaction, which decides what a failure means.
//
// # The rule
//
// A failed write is final (I4). Which pages the kernel has dropped is unknown, and
// an error may have been reported to one descriptor only, or, as that of a failed
// cache flush on ext4 and btrfs, to none. So one failure poisons every [Writer] that
// is open at that time: what they have written can never be committed, and nothing
// is retried into success. From then on the gate is shut, [Gate.Open] returns
// Unavailable, until a probe has written what the failure means into the journal. That
// proves that the file system accepts writes again.
//
// # The ways through
//
//   - [Gate.Commit] makes the tree of a Writer durable and runs one transaction.
//   - [Gate.SyncApart] makes it durable before; [Gate.CommitRest] then syncs the rest
//     and runs the transaction.
//   - [Gate.Synced] is the same for several steps after the sync.
//   - [Gate.Update] runs one transaction.
//   - [Gate.Do] runs any other write that ends with a sync of its own, and what
//     containerd's snapshotter writes.
//
// Each returns the error of the write, after the gate has handled it. Packages above
// never handle a failed write themselves. A test follows all calls that sync
// and finds one that goes around the gate (tests/house).
//
// # Lock order
//
//	apart     one syncfs that no Commit waits for at a time; none for files alone,
//	          whose descriptors report their errors whatever others sync
//	syncing   one sync and what follows it at a time
//	outage    what is left to do after a failed write; held during a probe
//	writers   the open Writers; held briefly, innermost
package gate

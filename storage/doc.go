// Package storage keeps metadata.db: containerd's snapshot rows and our commit
// journal, in one bbolt file and therefore in one transaction.
//
// # The pieces
//
//   - [DB] is the opened file. It is the MetaStore that containerd's overlay
//     snapshotter needs, so that its rows are stored here.
//   - [BeforeCommit] attaches a function to a context; the transaction that is
//     started with this context runs it last, with the [Journal] of the same
//     transaction. Rows and journal entries become durable together or not at
//     all.
//   - [OpenEntry], [CommitEntry], [StateEntry], [Run] and [Scrub] are the
//     journal's records; their encoding (and that of the record beside each
//     layer) is that of package internal/layout.
//
// # Promises
//
// I1, the record half: when a writable transaction returns nil, its rows and
// journal entries are on stable storage.
//
// I4: when it returns an error that wraps [ErrWrite], what is on disk is unknown,
// and the DB refuses every transaction until [DB.Rewrite]
// has succeeded. bbolt itself would go on: after a failed sync of its meta page
// the page cache holds the new state and the disk the old one, and the next
// transaction reuses pages that the old state still needs; after one of its data
// pages, ext4 loses what is written to them next. Rewrite copies the state into
// a new file, syncs it and renames it into place. A transaction that the kernel
// refused at once, as on a full disk, has changed nothing, and the next one may
// follow.
//
// An earlier process may have ended between a failed write and its consequences.
// Therefore [Open] drops the file from the page cache before it reads it.
//
// Removing works on a full disk: [DB.Reserve] keeps blocks for it. Reading works
// on a file system that has shut itself down: the file is mapped once, larger
// than it grows.
//
// metadata.db is created complete: written under a temporary name, synced, renamed,
// directory synced. bbolt's own creation is not crash-safe. A database that is
// missing beside existing snapshots, or that cannot be read, is never replaced
// silently: [Open] fails with [ErrMissing] or [ErrDamaged] and leaves
// everything as it is; [Rebuild] makes a new one from the snapshots' records.
// Before bbolt reads a file, internal/boltcheck verifies how its pages refer to one
// another: bbolt follows a circle until there is no memory left.
//
// # On disk
//
//	metadata.db
//	├── v1                     containerd's (core/snapshots/storage/bolt.go)
//	│   ├── snapshots/<key>    id, kind, parent, usage, times, labels
//	│   └── parents            child index
//	└── journal                ours
//	    ├── version            uvarint, 3; 1 and 2 are upgraded
//	    ├── run                Run: the daemon that has the root, and the epoch
//	    ├── scrub              Scrub: how far periodic verification is
//	    ├── open/<id>          OpenEntry: an active snapshot
//	    ├── committed/<id>     CommitEntry: a committed snapshot that exists
//	    ├── states/<id>        StateEntry: what the last verification of it has found
//	    └── history/<n>        CommitEntry of a removed one; the last n are kept
//
// Keys are big-endian 64 bit numbers. docs/formats.md has the bytes.
//
// # Concurrency
//
// A DB may be used from several goroutines. One writable transaction runs at a
// time, readers never wait for it. Close and Rewrite wait for the transactions
// in flight. Do not start a transaction from inside one.
package storage

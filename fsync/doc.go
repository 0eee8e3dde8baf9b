// Package fsync makes data durable, and defines what an error of a sync means.
//
// # The pieces
//
//   - [Cursor] is one descriptor on the file system of a snapshot. Its Sync is
//     syncfs(2). It is opened before the first byte of the snapshot is written,
//     belongs to that snapshot alone, and fails for good after the first error.
//   - [Files] are files of one extraction, to be made durable without what others
//     have written, where [OneJournal] allows it.
//   - [Dir], [File], [Rename] and [WriteFile] make single files and directories
//     durable, those that the program writes itself.
//   - [Inspect] checks the file system below a directory. It refuses one that cannot
//     keep the promise, and warns about one that weakens it.
//
// # What is assumed of the kernel
//
// syncfs writes every dirty page and inode of the file system, commits its
// journal and flushes the disk's cache. It is the only portable call that also
// covers symlinks, device nodes (whiteouts) and the xattrs of directories:
// those cannot be opened for fsync(2), and xfstests generic/690 shows that
// syncing their parent is not enough everywhere.
//
// Errors behave in unexpected ways. All of these were measured on ext4, xfs and btrfs
// of Linux 6.18:
//
//   - syncfs reports a writeback error once per descriptor, and only one that
//     happened after that descriptor was opened (since Linux 5.8, commit
//     735e4ae5ba28). A descriptor opened late therefore reports success over
//     lost data; a shared one reports the error to one of its users only.
//   - After an error the pages are marked clean. A second syncfs returns 0 and
//     the data is gone: nothing may be retried into success.
//   - Nor may the same pages be written again: on ext4, a page whose first write
//     failed counts as written from then on. A later write and fdatasync succeed,
//     the extent stays marked as unwritten, and the next mount reads zeros. A new
//     file, or the file dropped from the page cache, is safe.
//   - An error that was reported to no descriptor is reported to the next one that
//     is opened (errseq_sample), however long ago it happened.
//   - Before Linux 5.17 errors of the file system's own sync_fs are dropped
//     (commits 5679897eb104 and 2d86293c7075).
//   - ext4 with an aborted journal, and a failed cache flush on ext4 and btrfs,
//     still let syncfs return 0. A write on the same file system that must
//     reach its journal does fail: this is why the transaction that follows
//     every Sync lives on the same file system.
//   - syncfs of a FUSE file system does not reach its server, and syncfs of an
//     overlay mount is not syncfs of what is below it. Both are refused as a
//     root.
//
// # Concurrency
//
// A Cursor may be used from several goroutines; its calls exclude one another.
// The functions keep no state.
package fsync

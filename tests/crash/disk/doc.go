// Package disk is a disk that remembers: it records every write, flush and
// discard that a file system sends to it, in order, and fails on request.
//
//	test process                         server process (the same binary)
//	┌──────────────┐  control socket   ┌──────────────────────────────┐
//	│ Disk         │──────────────────▶│ log: write flush discard mark│
//	│  Mark Inject │                   │ faults                       │
//	│  Log  Reset  │   memfd (image)   │                              │
//	│  Image ══════╪═══════════════════╪═▶ image                      │
//	└──────┬───────┘                   └───────────────▲──────────────┘
//	       │ mkfs, mount                               │ FUSE: one file
//	   ext4/xfs/btrfs ──▶ /dev/loopN (volatile cache) ─┘ WRITE FSYNC FALLOCATE
//
// The loop driver sees a backing file with an fsync method, and therefore
// announces a volatile write cache without FUA: the block layer turns a FUA
// write into a write followed by a flush, and every cache flush arrives here as
// FSYNC. What lies between two flushes is what a power cut may lose or reorder;
// package state makes the disks that it could leave.
//
// # Promises
//
//   - The log is a total order. The file is opened with FOPEN_DIRECT_IO and
//     without parallel direct writes, so the kernel holds the inode's lock
//     across each write and fsync, and the server appends to the log before it
//     answers. A mark is appended before Mark returns.
//   - A request is either in the image and in the log, or, when a fault demanded
//     it, in neither. Of a short write the part that was written is in both.
//   - Nothing is taken for a flush that was not one: FSYNC is always
//     implemented (an ENOSYS would make the kernel stop sending it and answer
//     success by itself).
//
// # What it assumes
//
// The server must be another process: a process that serves the disk and also
// touches the file system on it can wait for itself. It takes memory only for
// the log, never writes a file, and declares to the kernel that it is part of the I/O
// path (PR_SET_IO_FLUSHER), so that reclaim does not wait for it either.
//
// A program that uses this package must call Init first thing in main or
// TestMain: the server is the program's own binary, started again.
//
// # After a crash
//
// When the test process dies, its end of the control pipe closes and the server
// ends; the loop device is set to clear itself on last close. What is left is a
// mount point whose device answers with errors; it goes with the mount
// namespace of the test, or by umount.
package disk

// Package state makes the disks that a power cut could leave behind, out of the
// log of a recording disk.
//
// # The model
//
// A disk has a volatile cache. Let the power go at point i, after the first i
// entries of the log. Everything before the last flush that was completed by
// then is on the medium. Of what came after it, the volatile part, each block
// of 4 KiB holds any one version: what it held at the flush, or what any one of
// the volatile writes to it left there. Blocks are independent of each other.
//
//	entries   W W F W W W F W W W │ W W F          │ the cut, point i
//	          └─durable──┘ └vol.──┘
//
// The order in which a disk writes its cache back needs no thought: every order,
// cut anywhere, leaves a disk of this kind and no other. 4 KiB is the unit that
// file systems assume to be atomic; smaller tears break btrfs itself.
//
// The loop driver has no FUA, so a FUA write is a write and a flush. This
// flushes more than a disk with FUA would, and the volatile part of a log is
// the smaller for it by what was in flight beside such a write.
//
// # Classes
//
//	prefix   every volatile write arrived: the cache was written in order
//	flushed  none did
//	drop.n   all but the n-th did
//	keep.n   only the n-th did
//	subset.x a random part of them did, whole writes
//	torn.x   all did, but one only in part
//	mix.x    every block has a version of its own: the model at its most general
//
// prefix and flushed are made at every point, drop and keep at the end of every
// stretch between flushes and at every mark, the others as many as requested,
// most of them near marks: CrashMonkey found that all its bugs followed a crash
// right after a sync (OSDI'18).
//
// Different states often are the same disk. Each distinct disk becomes one Case,
// to be examined once and judged for all the points where it can occur.
//
// # Names
//
// A State prints as point, class and number, such as 1234.subset.9f3a1b, and is
// read back by Parse. With the same log it always means the same bytes. A
// second cut during recovery is written behind the first: 1234.prefix>17.drop.3.
package state

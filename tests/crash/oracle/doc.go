// Package oracle examines a disk after a power cut and decides whether the
// snapshotter has kept its promises.
//
//	Expect   what was promised at a point of the log, from the marks
//	Examine  what a snapshotter reports after its recovery, and what is on the disk
//	Judge    the one against the other: findings
//
// Examine knows nothing of the point, only of the disk. One examination serves
// all the points where the power may go and leave that disk.
//
// # What is expected of a committed name
//
//	acked    its Commit was answered: it is there, Stat reports committed, its
//	         parent is right, every entry of it equals the fingerprint
//	maybe    its Commit or its Remove was begun: it is there, whole, or not there
//	gone     never begun, or removed and answered: it is not there
//
// Stat, View, Prepare and Mounts succeed for a name when its tree on the disk is
// what was unpacked, and only then; every examination begins with an unannounced boot of the
// machine, so that the snapshotter must find out by itself. To refuse what
// is whole is a loss, too. Layers that were damaged by hand before the power
// went must be whole at the first call that needs them, if their blobs are there; a
// chain of which one is not must be refused with FailedPrecondition and the name
// of the damaged layer, and be in the way of nothing else.
//
// And of all together: the snapshotter starts; the parent of a name that is
// there is there; an active key whose Prepare was answered is there with its
// directories; no directory is left after Cleanup without a row, and no
// tree beside the layers that was begun to heal one; starting a second time gives
// the same answers; what was not committed can be extracted and committed now.
//
// # Words
//
// A layer is lost when it was acked and is not there, or is refused. A lie is a
// name that is reported and is not whole, or was never committed. It is a lie, too,
// when damage that a comparison of content has found is cleared by less, and when a
// layer with a good blob is reported as one without: its image would be dropped.
// Damage to content that nothing has compared yet is hidden, and success for it is
// no lie. A flaw is any other broken expectation. A disk that the file system
// itself could not mount was not measured: no layer could be examined.
package oracle

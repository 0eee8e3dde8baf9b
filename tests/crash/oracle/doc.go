// Package oracle looks at a disk after a power cut and says whether the
// snapshotter has kept its word.
//
//	Expect   what was promised at a point of the log, from the marks
//	Look     what a snapshotter says after its recovery, and what is on the disk
//	Judge    the one against the other: findings
//
// Look knows nothing of the point, only of the disk. One look at a disk serves
// all the points where the power may go and leave that disk.
//
// # What is expected of a committed name
//
//	acked    its Commit was answered: it is there, Stat says committed, its
//	         parent is right, every entry of it equals the fingerprint
//	maybe    its Commit or its Remove was begun: it is there, whole, or not there
//	gone     never begun, or removed and answered: it is not there
//
// Stat, View, Prepare and Mounts say yes about a name when its tree on the disk is
// what was unpacked, and only then; every look is a boot of the machine that was
// not announced, so that the snapshotter must find out by itself. To refuse what
// is whole is a loss, too. Layers that were damaged by hand before the power
// went must be whole as soon as they are asked for, if their blobs are there; a
// chain of which one is not must be refused with FailedPrecondition and the name
// of the damaged layer, and be in nobody's way.
//
// And of all together: the snapshotter starts; the parent of a name that is
// there is there; an active key whose Prepare was answered is there with its
// directories; no directory is left after Cleanup that no row speaks of, and no
// tree beside the layers that was begun to heal one; starting a second time gives
// the same answers; what was not committed can be extracted and committed now.
//
// # Words
//
// A layer is lost when it was acked and is not there, or is refused. A lie is a
// name that is reported and is not whole, or was never committed. A flaw is any other broken expectation. A disk that the file system
// itself could not mount was not measured: nobody's layer could be looked at.
package oracle

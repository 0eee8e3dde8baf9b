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
// And of all together: the snapshotter starts; the parent of a name that is
// there is there; an active key whose Prepare was answered is there with its
// directories; no directory is left after Cleanup that no row speaks of;
// starting a second time gives the same answers; what was not committed can be
// extracted and committed now.
//
// # Words
//
// A layer is lost when it was acked and is not there, or is admitted to be
// damaged. A lie is a name that is reported and is not whole, or was never
// committed. A flaw is any other broken expectation. A disk that the file system
// itself could not mount was not measured: nobody's layer could be looked at.
package oracle

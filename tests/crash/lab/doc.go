// Package lab runs crash experiments: it records a workload on a disk, makes the
// disks that a power cut could leave, has the oracle examine each, and counts.
//
//	Record   workload on a recording disk ──▶ Recording {base image, log, marks, fingerprints}
//	Heal     the same with layers that are damaged before it begins, and heal
//	Check    Recording ──▶ cases ──▶ workers {set state, mount, examine, judge} ──▶ Tally
//	Hunt     a mutant, until its defect shows
//	Cut      the two cheaper ways: FS_IOC_SHUTDOWN, and SIGKILL of everything
//	Full     the same with a real containerd on the disk
//
// # Verdicts
//
// A state survived, or it was lost (a layer whose commit was acknowledged is not
// there or not whole), or it is a lie (a layer is reported that is not
// whole), or it is flawed (anything else that was promised), or it was not
// measured (the file system could not be mounted, so nothing was examined). These are
// counted apart, and a state counts once, by the worst.
//
// An experiment that itself went wrong, such as one without a flush in its log
// or one whose control survives, is an error that wraps ErrBroken. It proves
// nothing, and never counts as passed.
package lab

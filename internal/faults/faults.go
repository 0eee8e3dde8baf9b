// Package faults names the instants at which a test may kill the process, and
// the defects a test may plant in it.
//
// A release binary has neither. Without the build tag "faults", Point and
// Mutant are empty functions with constant results: the compiler removes the
// calls, their arguments and the defective branches, and a test looks into the
// binary to see that no name is left. With the tag, the environment decides:
//
//	DURABLE_KILL_AT=commit.synced      SIGKILL to ourselves at that point
//	DURABLE_KILL_AT=commit.synced:3    the same, the third time it is reached
//	DURABLE_MUTANT=no-syncfs           the named defect is active
//
// The names of the points stand in points.go, one for every gap between two
// steps that touch the disk.
package faults

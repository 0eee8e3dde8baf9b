// Package faults names the instants at which a test may kill the process.
//
// A release binary has none. Without the build tag "faults", Point is an empty function:
// the compiler removes the calls and their arguments, and a test verifies that no name
// is left in the binary. With the tag, the environment decides:
//
//	DURABLE_KILL_AT=commit.synced      SIGKILL to ourselves at that point
//	DURABLE_KILL_AT=commit.synced:3    the same, the third time it is reached
//
// The names of the points are in points.go, one for every gap between two steps that
// write to the disk.
package faults

// Package matrix runs the same nine jobs on each release of containerd that README.md
// makes a statement on: pull, run, a power cut, heal from the blob and from a registry, repair,
// the CRI plugin, and the disk figures that the kubelet gets. A node of a release is one
// containerd, with its own ctr and shim, on a disk whose power is cut three times.
//
// What is expected of each release is in table_test.go, and README.md has the same table.
// A job that does not do what the table has, in either direction, fails the test.
//
// make test runs the releases that are supported longest; make test-matrix runs all of
// them and prints the table of what it saw.
package matrix

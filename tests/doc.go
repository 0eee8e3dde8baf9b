// Package tests tries durable-snapshotter on real parts: containerd 2.4.2 and
// Debian's 1.6 with their clients, runc, a registry, and loop disks with ext4.
//
// Every test makes its own disk and starts its own daemons on it with newStack;
// package kit has the parts. Nothing touches the machine's own file system
// beyond a scratch directory, and nothing outlives the run.
package tests

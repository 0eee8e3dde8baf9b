// Package api tests what containerd and its clients get from durable-snapshotter:
// containerd's own conformance suite, calls that must fail, pulls and containers
// with containerd 2.4.2 and with Debian's 1.6, the verbs of ctr snapshot, and, in
// traces of system calls, that a layer is synced before it is committed.
//
// Every test makes its own disk and starts its own daemons on it with newStack;
// package kit has the parts. Nothing touches the machine's own file system
// beyond a scratch directory, and nothing outlives the run. One test:
//
//	go test -count=1 -v ./api -run 'TestPull$'
package api

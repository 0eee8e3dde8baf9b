// Package bench compares the daemon with containerd's built-in overlayfs
// snapshotter in the same run: the ratios mean something on any machine, the
// times only on this one. Whole pulls are in package pulls. It has no tests.
// make bench runs all of it; one:
//
//	go test ./bench -run '^$' -bench BenchmarkCommit -benchtime 3x
package bench

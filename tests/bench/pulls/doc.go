// Package pulls measures whole pulls of images through a real containerd, with the snapshotters
// that containerd has and with durable-snapshotter. Command bench, in tests/cmd, is its program.
//
// # What one pull is
//
// Each variant, [Variants], has a disk of its own: a loop device with a file system. For each
// pull, containerd and, for durable, the daemon are started on it; `ctr image pull` is measured
// from its start to its end; then a syncfs writes what it has left in memory; then the image is
// removed, containerd's garbage collection has run, a second syncfs has ended, and nothing may
// be left. So each pull begins with the same disk and with new processes. The registry is on
// loopback, and its blobs are in the page cache.
//
// All variants take turns: each round pulls each image once with each variant, and each round
// begins with another variant. The ratio of a pull is to the pull of the same image with the
// same setting and overlayfs in the same round, and what is reported is the median of ratios. A
// machine that becomes slower for a while changes the seconds, and the ratio hardly. The first
// round fills caches, and is not counted.
//
// # The result
//
// A [Report] is written as JSON, with each pull as it was measured: tables and charts are made
// from it alone. Its fields and those of [Pull] have the meaning and the units.
package pulls

// Package boot measures what a node waits for after it was switched on: from the start of the
// snapshotter until its socket answers, until the images of the first pods can be used, until
// all images have an answer, which the CRI plugin asks for at once before it serves, and until
// everything is verified. Nothing of the disk is in memory at first.
//
// The layers have the shape of real ones, but no content, which no verification of a boot
// reads. durable-snapshotter is measured after a power cut, and after a stop in order, when it
// verifies nothing. containerd's overlayfs never does.
package boot

// Package images determines for each image of containerd whether it is ready, what is
// missing, and what repairs it with the least change.
//
// A row in containerd's image store does not show that an image is ready. Its content may
// be missing or corrupt behind a row of the right size, its snapshots may be gone on either
// side, or a pull has ended half-way. So [Checker.Check] compares, in each namespace:
//
//	documents   index, manifest and config are read and compared with their digests
//	layer blobs the files are there and have the size on record; with Options.Deep, or
//	            when a layer needs its blob, they are read and compared with the digest
//	chain       each chain ID is on record at containerd, and at the snapshotter under the
//	            same key; its tree is verified as the verb check does
//	use         containers, and other snapshots, that stand on a layer that is not ready
//	work        a pull that is fetching or unpacking the image at this time
//
// An error of containerd, or of the disk under everything, is no evidence about an image:
// its verdict is Unknown then. containerd is asked first, and the rows of the snapshotter
// are read after that, so what a pull completes meanwhile is seen on the second side, too;
// what is not ready is examined a second time, and only the second result counts. Each blob
// and each layer is examined once, however many images share it.
//
// Stat is not used to find out whether containerd has a key: the snapshotter verifies and
// heals when it is called. Usage does neither, and containerd resolves the key for it in the
// same way.
//
// A damaged layer is also searched for outside of containerd's content store: in image
// archives, as a daemon does that heals it.
//
// [Checker.Plan] and [Checker.Apply] repair, see repair.go for the order and its reasons.
package images

// Package overlay shows that a layer means on disk what its tar means.
//
// Generated images are unpacked by containerd's own code through its own
// metadata database, sequentially and in parallel, into the daemon under test
// and into the built-in overlay snapshotter. What a mount of the result shows
// is compared with a reference that knows the OCI image specification and
// nothing of overlayfs. The built-in snapshotter is not always right: every
// known deviation is modelled and named, and what the models do not explain
// fails the test, too.
//
//	go test ./overlay                               the images of `make test`
//	go test ./overlay -run Differential -images 5000 -seed 7
//	go test ./overlay -run Differential -seed 7 -image 1234
//
// The last form repeats one image. -way "durable, in" unpacks in that way only,
// -failures 20 goes on after that many. A failure prints the image, shrunk to
// what matters.
package overlay

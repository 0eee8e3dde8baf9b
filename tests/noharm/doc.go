// Package noharm has harmless things happen to a node in use, and everything
// that could take them for damage at work: no layer is called damaged, no tree is
// replaced, no image is dropped, no container disturbed.
//
// # The node
//
// containerd with its CRI plugin and the daemon, which scrubs every two seconds and
// may drop images, on a disk of its own; an image of three layers with one of each
// kind of entry that some tool treats in its own way; a container on it, which
// observes; and no registry any more, so that what is dropped stays away. It is
// there on ext4 with the blobs of the layers and without them, on xfs without, and on
// btrfs with them; with -six-nodes on each in both ways.
//
// # The events
//
// What tools, kernels, operators and clocks do: cycles in events_test.go lists
// them. Those of a cycle happen together. While they last, and after them, the
// node is provoked: every verb that verifies or repairs, scrubs of metadata and of
// content, a boot after a power cut, questions by containerd, a new container.
// When there are problems, each event is tried alone on a node of its own, so that
// the subtests that fail are those at fault.
//
//	go test ./noharm -run NoHarm/ext4,blobs -events 'selinux|cp-al' -v
//
// Some events change what is on disk for a while, so that damage may be reported
// then: a layer that is away is missing. What counts is that nothing is done about
// it on that evidence, and that the next verification clears it. containerd is
// down meanwhile, and the content store away, so that it is known which of the two
// came first.
//
// # What is where
//
//	cycle_test.go      a round of events, and the verdict on it
//	events_test.go     the list, and what happens in the layers
//	daemon_test.go     what happens to the daemon and around it
//	disk_test.go       what happens to the disk while nothing runs
//	control_test.go    what does do harm is noticed; good blobs keep an image
//	mutants_test.go    mistakes planted in the daemon are noticed
//	clock_test.go      a daemon whose clock is wrong
package noharm

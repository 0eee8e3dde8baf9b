// Package damage takes layers of an image in use apart, in every way that
// catalogue_test.go lists, and verifies what the daemon's verbs report and do about
// it: a node of containerd, daemon and a container that runs on the image, for
// each file system.
//
// # The image
//
// Its layers are base, middle, top, and an empty one. In each of the first three
// every damage of the catalogue has a directory of its own, such as
// middle/file-emptied, with victims that fit; so any number of damages can be
// done at once, and each finding names by its path which one it is about.
//
// # The damages
//
// They are quiet: times are put back, so that the damage shows by itself and not
// by the time of the directory around it. Those called deep leave all metadata
// as it was.
//
// # The container
//
// Its only process, package witness, holds a file of each layer open, reads
// others by path, and counts in a file of its own. It runs through all cases.
//
// # The boot
//
// A machine that starts again has another boot ID. In the mount namespace of the
// tests a file of ours lies over the kernel's (kit.NewBoot), so the daemon under
// test is the one that users run. Tests in which it changes run one by one,
// the others side by side: most of their time they wait for the daemon, which
// takes digests of content at its leisure.
//
// # What is where
//
//	detect_test.go    check finds the damage, and nothing else
//	heal_test.go      repair, or any call that needs it, gets the layer back in place
//	gate_test.go      after a power cut no caller gets a layer that is damaged
//	blob_test.go      without a good blob it stays damaged, and is refused
//	contents_test.go  content is compared although blobs are gone
//	scrub_test.go     the daemon verifies by itself, when it is configured to
//	healthy_test.go   1,200 layers that are whole are never called anything else
package damage

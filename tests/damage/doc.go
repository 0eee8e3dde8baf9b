// Package damage takes layers of an image in use apart, in every way that
// catalogue_test.go lists, and looks at what the daemon's verbs say and do about
// it: a node of containerd, daemon and a container that runs on the image, for
// each file system.
//
// # The image
//
// Its layers are base, middle, top, and an empty one. In each of the first three
// every damage of the catalogue has a directory of its own, such as
// middle/file-emptied, with victims that fit; so any number of damages can be
// done at once, and each finding says by its path which one it is about.
//
// # The damages
//
// They are quiet: times are put back, so that the damage shows by itself and not
// by the time of the directory around it. Those called deep leave all metadata
// as it was.
//
// # The container
//
// Its only process, package witness, holds a file of each layer open, looks at
// others by path, and counts in a file of its own. It runs through all cases.
//
// # The boot
//
// A machine that starts again has another boot ID. In the mount namespace of the
// tests a file of ours lies over the kernel's, so the daemon under test is the
// one that users run (boot_test.go).
package damage

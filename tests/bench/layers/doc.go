// Package layers measures what a client waits for while the daemon's differ extracts single
// layers and commits them: with each setting of sync, on a disk of its own, alone and beside a
// neighbor that writes to the pages of a file on it.
//
// A round does the same with each setting, and with the neighbor: a chain of a few layers, one
// after another, each with Prepare, Apply and Commit over gRPC, as containerd calls them. Commit is
// what containerd's metadata is locked for. Between two chains everything is on disk.
package layers

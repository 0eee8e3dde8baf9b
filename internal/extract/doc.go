// Package extract makes the tree of a layer out of its tar, as containerd's applier does
// (pkg/archive of containerd, the reference of every test): the same trees, and the same
// refusals. It needs a fifth of the system calls, and works in stages:
//
//		read  ──▶ entries  one goroutine, for all that has an order: names, links, whiteouts,
//		                   the diff ID and, with the same pass over its bytes, the digest of each file
//		           ├─▶ files     content and attributes of small files, some at a time
//		           └─▶ big files the same, one file after another
//
//	  - apply.go: [Apply], the stages and how they end.
//	  - stream.go: blocks of the stream, and their sum.
//	  - content.go: the bytes of one file, and both sums of them.
//	  - entries.go: what an entry does to the tree.
//	  - whiteouts.go: what a whiteout does to the tree.
//	  - dirs.go: which directories there are, and their descriptors.
//	  - files.go: what is written to files.
//	  - attrs.go: owner, extended attributes, mode and times of one entry.
//
// Names are created, replaced and removed by one goroutine in the order of the tar, so
// that the order means what it means to containerd; only what is inside a file is
// written by others. Every system call is relative to the descriptor of a directory
// that was reached without following a link.
//
// Memory is bounded by [Memory] for each layer and [Layers] layers, but for a few words
// for each directory of the tar; descriptors by [Descriptors] for each layer. Nothing is synced:
// that the caller's sync covers.
package extract

// Package mtree reads and writes the text files beside a layer: its seal, and its list of
// content digests. Packages seal and contents document what their lines mean.
//
// A text is in the format of mtree(5), version 2.0 of NetBSD's mtree: a header, then a
// line per entry with its path and keywords. Lines come in the order of a walk that
// visits the names of a directory sorted by their bytes and what is below a directory
// right after it (see ComparePaths), so that two texts, or a text and a tree, are
// compared in one pass. Files are compressed with gzip. The digest of a text, which the
// journal keeps, is that of the text before the compression, "sha256:…".
//
// [Reader.Check] compares that digest: until it has returned nil, no line that was read
// means anything. [ErrUnsealed] means that the file is known to be lost; any other error
// means that it could not be examined, and is no evidence of anything.
package mtree

// Package contents compares the content of the regular files of a layer: with digests
// that were taken earlier, and with the tar that the layer was unpacked from.
//
//	Write      tree ──▶ list of digests
//	NewList    the same, of a tree that the caller walks through, and of which it has written files
//	Verify     tree and list of digests ──▶ findings
//	VerifyTar  tree and the tar that it was unpacked from ──▶ findings
//
// Content is not part of a layer's seal, because to read everything takes longer than a
// Commit may. Its digests are a separate list, made later in the background, in the
// format of package mtree; which entries exist, and with which attributes, is
// recorded in the seal. [Reading] limits the share of the disk and the processors that
// reading uses.
//
// Memory is bounded whatever the tree holds, holes are not read, and no file on another
// mount is opened ([tree.ErrMounted]).
//
// Three results are distinguished. A finding is a difference that was seen.
// mtree.ErrUnsealed means that the list itself is known to be lost. Any other error
// means that nothing could be examined, and is no evidence of anything.
package contents

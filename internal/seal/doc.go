// Package seal writes down what a directory tree is, entry by entry, and finds
// out later whether it still is.
//
// A seal is a text in the format of mtree(5), version 2.0 of NetBSD's mtree: a
// line per entry with its path, type, mode, owner, time of modification, size,
// link count, device number, link target and extended attributes. Content is
// not part of it: its digests are a list of their own, made later and at leisure,
// because to read everything takes longer than a Commit may. Lines come in the order of a walk that visits the names of a
// directory sorted by their bytes and what is below a directory right after it.
// Seals are compressed with gzip.
//
//	Walk    tree ──▶ lines, in order; several entries are looked at at a time
//	Write   tree ──▶ seal, and what was counted on the way
//	Verify  tree and seal ──▶ findings
//
//	WriteContents   tree ──▶ list of digests
//	VerifyContents  tree and list of digests ──▶ findings
//	VerifyTar       tree and the tar that it was unpacked from ──▶ findings
//
// Extended attributes are written as xattr.<name>=<base64>, the keyword of
// go-mtree; the other keywords are those of mtree(8), which can check a seal
// when they are taken out. What the kernel's overlayfs notes for itself on
// layers in use is left out.
package seal

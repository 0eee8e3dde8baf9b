// Package archives finds layers in image archives on disk: what "ctr image export" and
// "docker save" write, and what nodes without a registry are installed from. Layers are
// healed from them when containerd's content store has no good blob.
//
//	OCI       blobs/<algorithm>/<hex>: manifests, configurations, layers, by digest
//	docker    manifest.json: of each image its configuration and its layers, by names
//	          in the archive; newer ones are both
//
// An archive may be compressed with gzip, zstd or bzip2. It is read once from its beginning to
// its end, for its documents and for where its layers lie, and again when its size, times or
// inode have changed. Documents are bounded in number and size; layers are streamed, out of
// the middle of the file when it is not compressed. Names in an archive are only compared with
// each other: nothing is ever extracted by them.
//
// What an archive claims is no evidence: of a blob that comes from here the tar is
// compared with the diff ID before it is used, and the diff ID with the chain ID. So an
// archive that is cut, damaged or made to deceive can be of no use, and do no more.
//
// Nothing here writes.
package archives

// Package blobs finds the blob that a layer was extracted from in containerd's
// content store, on disk, without containerd.
//
// A committed layer is known by its chain ID; the store knows blobs by their
// own digest. Manifests and configurations of images, which are blobs as well,
// lead from one to the other:
//
//	manifest ──▶ layers:  blob digest, size, media type     one each,
//	    └──────▶ config:  diff IDs ──▶ chain IDs            in the same order
//
//	<root>/blobs/<algorithm>/<hex>                          all of them lie here
//
// The name of a blob is the only thing containerd checks before it uses it,
// and a power cut may have left anything in it. So manifests and configurations
// whose digest is not their name are skipped. Layers are large: Find checks their size,
// Verify reads them.
//
// Which manifest belongs to which image, and whether any image still refers to it,
// is in containerd's database, which is locked while containerd runs. It is not
// needed: the meaning of a chain ID does not change.
//
// Nothing here writes. A Store may be used from several goroutines.
package blobs

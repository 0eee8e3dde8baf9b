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
// What a blob is called is the only thing containerd checks before it uses it,
// and a power cut may have left anything in it. So manifests and configurations
// must have the digest that is their name, or they are passed over. Layers are
// large: Find looks at their size, Verify reads them.
//
// Which manifest belongs to which image, and whether any image still wants it,
// is in containerd's database, which is locked while containerd runs. It is not
// needed: what a chain ID stands for does not change.
//
// Nothing here writes. A Store may be used from several goroutines.
package blobs

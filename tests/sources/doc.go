// Package sources shows where the good bytes of a damaged layer come from, on a running
// containerd: another image's blob, an image archive on disk, the registry. For each of them
// the layer's own blob is gone or corrupt, or the manifest is gone, too, with a container
// running on the image and without one.
//
// In each case the layer is healed in place and equals its fresh unpacking, no image is
// dropped, no container is disturbed, and containerd has the blob again after a collection,
// unless another image's blob was used.
package sources

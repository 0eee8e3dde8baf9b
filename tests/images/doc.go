// Package images shows that check --images gives the right verdict about every image of a
// node, that repair --images plans the least destructive repair, and that what it does
// ends in an image that is ready, or in a clean pull that works. The node has a containerd
// with its CRI plugin and a daemon that heals only when it is told to.
//
// Images are small and stand on one base, so that a whole catalogue of damages is on one node
// at the same time, and is examined and repaired in one call:
//
//	go test -v ./images -run 'TestCatalogue$'
//
// TestMatrix has the places that a layer's bytes can be at as a dimension; make test covers all
// pairs of its values, make test-images all combinations. TestCutPull cuts the power during
// pulls by the CRI plugin, and during the creation of containers of images that were imported.
package images

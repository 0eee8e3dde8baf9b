// Package images repairs through containerd's API what cannot be healed in place:
// a committed snapshot that is not whole, and whose blob is missing or corrupt
// too.
//
// containerd answers "already exists" for a layer from its own database, and
// fetches no blob whose row it has. So as long as its rows say that the layer and
// its blob are there, no pull mends anything. [Containerd.Drop] takes those rows
// away, so that the next pull fetches and unpacks what was bad, and only that:
//
//	look      which images have the layer, which snapshots are on top of it,
//	          which blobs of those images are bad; nothing is touched when a
//	          container holds the layer
//	keep      lease the good blobs and the good layers below for the next pull
//	images    delete every name of those images; the CRI plugin forgets them
//	blobs     delete the rows of the bad blobs, in every namespace, for the file
//	          is one for all of them; have containerd delete the files, and wait
//	keys      remove the snapshots, from the top down
//	collect   have containerd, and the snapshotter, delete what is left of them
//
// The order is for an interruption at any step, and for pulls meanwhile.
//
//   - The snapshots' keys go last. As long as they are there, no pull gets past
//     them, and whoever finds the damaged layer calls Drop again; every step finds
//     for itself what is left to do.
//   - Blobs go before, down to the file: a pull takes a file of the right length for
//     good, whatever is in it.
//   - Images go before both, because the CRI plugin lists, and would try to start,
//     an image whose snapshots are gone.
//
// [Containerd.Announce] is for layers that were healed in place: the CRI plugin
// looks at snapshots only when containerd starts, so an image that was not whole
// then stays unknown to it until a pull, or until somebody changes its record.
//
// Nothing here may be called from inside a call of containerd to the snapshotter:
// containerd holds locks then, and asks the snapshotter back.
package images

// Package repull repairs through containerd's API what cannot be healed in place: a
// committed snapshot that is damaged, and whose blob is missing or corrupt too.
//
// containerd returns "already exists" for a layer from its own database, and does not
// fetch a blob of which it has a row. So as long as it has the rows of the layer and its
// blob, no pull repairs anything. [Containerd.Drop] removes those rows, so that the next
// pull fetches and unpacks what was bad, and only that:
//
//	plan      which images have the layer, which snapshots are on top of it,
//	          which blobs of those images are bad; nothing is changed when a
//	          container holds the layer
//	evidence  of no manifest that has the layer, in any namespace, are the
//	          manifest, the config and the blob of the layer all good, as read
//	          through containerd's API; else nothing is dropped
//	keep      lease the good blobs and the good layers below for the next pull
//	confirm   the caller verifies the layer once more, as deep as its damage was
//	          found, and the evidence is gathered again
//	abandoned remove the extraction keys that only containerd has: nothing shows
//	          whether they stand on the layer
//	above     remove the snapshots on the layer, from the top down
//	early     delete the names that could not be found again after the next step
//	blobs     delete the rows of the bad blobs, in every namespace, for the file
//	          is one for all of them; have containerd delete the files, and wait
//	images    delete all other names of those images; the CRI plugin forgets them
//	damaged   remove the layer's own snapshot
//	collect   have containerd, and the snapshotter, delete what is left of them
//
// The evidence is containerd's own, because the caller may read another content store
// than containerd's, or may lack what it takes to extract a blob that is good.
// Other clients can store any manifest: in other namespaces than the layer's, a blob
// counts only when it was proven to hold the layer.
//
// The order is for an interruption at any step, and for pulls meanwhile.
//
//   - The lease comes before confirm: of the steps after it none can be taken back,
//     and no time shall pass between the second verification and the first of them.
//   - containerd refuses to remove a snapshot that others stand on. So everything that
//     it can refuse comes before the names: while they are there, the image is damaged,
//     and not lost. In the meantime the CRI plugin may list it, but starts no container
//     of it: it unpacks the snapshots that are gone (internal/cri/opts/container.go:44),
//     and the damaged one is refused.
//   - The damaged snapshot is removed last. As long as it is there, no pull gets past it,
//     and the caller, who finds it damaged, calls Drop again; every step determines what
//     is left to do. Without it, a name that is left would never be deleted: an image
//     whose layers are gone, which no pull with the policy IfNotPresent repairs.
//   - Blobs go before, down to the file: a pull takes a file of the right length for
//     good, whatever is in it.
//   - After an interruption the names must be found again. What leads to them (index,
//     manifest, config) may be among the bad blobs; then they go before the blobs.
//
// A layer has one lease at most, and it is deleted when the layer is committed again,
// see [Containerd.Release]. [Containerd.CollectMissed] is for what containerd could not
// delete while the snapshotter was down.
//
// [Containerd.Announce] is for layers that were healed in place: the CRI plugin
// reads snapshots only when containerd starts, so an image that was not ready
// then stays unknown to it until a pull, or until its record is changed.
//
// Before a drop, package refill has containerd fetch what was bad, so that the layer can be
// healed in place. Package notify decides when to call these, and retries them.
//
// Nothing here may be called from inside a call of containerd to the snapshotter:
// containerd holds locks then, and calls the snapshotter in turn.
package repull

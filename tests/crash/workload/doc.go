// Package workload is what happens on the disk before the power goes: layers
// are prepared, extracted, committed, removed and prepared again, through the
// API that containerd uses with a snapshotter.
//
//	Plan   what there is to do, made from a seed: chains of layers with every
//	       kind of entry, in two namespaces
//	Run    does it, one goroutine a chain, and marks the log of the disk
//	Record what a test must know afterwards: the fingerprint of each layer
//
// # Healing
//
//	Unpack       four chains, before the recording, two of them with a container
//	Hurt         damages most of their layers by hand, by the seed of the plan; two
//	             of them, on request, in their content only
//	WriteContent their blobs in a content store of containerd's, all but one
//	Heal         uses everything in every way while other chains are unpacked,
//	             one is removed while it heals, and one is extracted again under
//	             the names that it has
//
// # Marks
//
// A mark "begin" is appended before a call is sent, a mark "ack" after its
// answer was received and before the same goroutine does anything else, a mark
// "fail" after an error. So at any point of the log it is known what was
// promised (acked), what may or may not be (begun), and what cannot be (never
// begun, or removed and acknowledged).
//
// Layers are extracted by containerd's own applier (core/diff/apply), from tar
// streams, into the mounts that Prepare returned.
package workload

// Package refill brings good blobs into containerd's content store, in the place of those
// that are missing or bad: [Fetch] has containerd fetch them from a registry, and [PutBack]
// stores one that a layer was healed from, and that lies elsewhere.
//
// containerd takes a file of which it has a row for the blob, whatever is in it. So the rows of
// bad blobs are deleted first, and a lease keeps all that they refer to.
package refill

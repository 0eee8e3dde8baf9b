package recorded

import (
	"slices"

	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// ChainID returns the chain ID of a layer whose name has none, from its
// diff ID, which only extractions have as a label, and the chain IDs below it. find
// returns the entry of a committed name.
func ChainID(e storage.CommitEntry, find func(name string) (storage.CommitEntry, bool)) string {
	if e.ChainID != "" {
		return e.ChainID
	}
	// Chains of layers without names end at one that has a chain ID, or at the base.
	var diffIDs []digest.Digest
	for range maxChain {
		if e.ChainID != "" {
			diffIDs = append(diffIDs, digest.Digest(e.ChainID))
			break
		}
		if !layout.IsDigest(e.DiffID) {
			return ""
		}
		diffIDs = append(diffIDs, digest.Digest(e.DiffID))
		if e.Parent == "" {
			break
		}
		var ok bool
		if e, ok = find(e.Parent); !ok {
			return ""
		}
		if len(diffIDs) == maxChain {
			return ""
		}
	}
	slices.Reverse(diffIDs)
	return identity.ChainID(diffIDs).String()
}

// maxChain is more than any overlay mount has lower directories.
const maxChain = 1 << 10

// Identified completes a journal entry from its name: what was there before the
// journal has neither chain ID nor namespace in its entry.
func Identified(e storage.CommitEntry) storage.CommitEntry {
	if e.Namespace == "" {
		e.Namespace, _ = layout.SplitName(e.Name)
	}
	if e.ChainID == "" {
		e.ChainID = layout.ChainIDOf(e.Name, nil)
	}
	return e
}

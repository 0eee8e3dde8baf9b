// Package recorded with planted defects: those that are too long for an edit, see tests/defects.
// go build -overlay adds this file to the package.
package recorded

import "github.com/durable-snapshotter/durable-snapshotter/storage"

// plantedBelieves takes a swap that the journal announces for done.
func plantedBelieves(epoch uint64, healed *storage.CommitEntry) bool {
	if !planted("heal-swap-first") && !planted("heal-intent-believed") {
		return false
	}
	healed.Epoch = epoch
	return true
}

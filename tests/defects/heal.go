package defects

// healEdits are mistakes in the replacement of a damaged tree, and in the recovery of
// one that was interrupted.
var healEdits = []Edit{
	{
		File: "internal/layers/heal.go",
		Old: `
	writer, err := h.gate.OpenWriter(dir, 0)`,
		New: `
	writer, err := h.gate.OpenWriter(plantedHealed(dir), 0)`,
	},
	{
		File: "internal/layers/swap.go",
		Old: `
	healing, ready := h.swapStates(healed)`,
		New: `
	if handled, err := h.plantedSwap(dir, healed, update); handled {
		*exchanged = true
		return err
	}
	healing, ready := h.swapStates(healed)`,
	},
	{
		File: "internal/recorded/recorded.go",
		Old: `
	state.Healing = nil`,
		New: `
	if plantedBelieves(epoch, healed) {
		return *healed, storage.StateEntry{ID: e.ID}, true
	}
	state.Healing = nil`,
	},

	// The seals of other layers show that a tree is not the one in the journal. The
	// defects of a swap can be seen only without that.
	{
		File: "internal/unpack/below.go",
		Old: `
	return parentsOf(lower), err`,
		New: `
	parents := parentsOf(lower)
	if planted("heal-ready-first") || planted("heal-swap-first") || planted("heal-intent-believed") {
		for i := range parents {
			parents[i].Digest = "" // then its tree is read
		}
	}
	return parents, err`,
	},
	{
		File: "internal/layers/inherited.go",
		Old: `
	if e.Digest == "" || e.Parent == "" || userns.RunningInUserNS() {`,
		New: `
	if e.Digest == "" || e.Parent == "" || userns.RunningInUserNS() || planted("inherit-from-disk") || plantedTrusts() {`,
	},
}

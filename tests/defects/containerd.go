package defects

// containerdEdits are mistakes in the agreement with containerd: in what is dropped and
// collected, and in what its calls wait for.
var containerdEdits = []Edit{
	{
		File: "internal/repull/drop.go",
		Old: `
	return []step{d.keep, d.confirm, d.dropAbandoned, d.dropAbove, early, d.dropBlobs, late, d.dropDamaged, d.collect}`,
		New: `
	switch {
	case planted("drop-names-first"):
		return []step{d.keep, d.confirm, early, late, d.dropAbandoned, d.dropAbove, d.dropBlobs, d.dropDamaged, d.collect}
	case planted("abandoned-keys-kept"):
		return []step{d.keep, d.confirm, d.dropAbove, early, d.dropBlobs, late, d.dropDamaged, d.collect}
	}
	return []step{d.keep, d.confirm, d.dropAbandoned, d.dropAbove, early, d.dropBlobs, late, d.dropDamaged, d.collect}`,
	},
	{
		File: "internal/repull/lease.go",
		Old: `
	unknown, err := d.withoutRow(ctx)`,
		New: `
	if planted("stale-links-hold") {
		return refused
	}
	unknown, err := d.withoutRow(ctx)`,
	},
	{
		File: "internal/repull/orphans.go",
		Old: `
	return "", c.collectIn(ctx, all[0], snapshotter)`,
		New: `
	if planted("missed-stays") {
		return "", nil
	}
	return "", c.collectIn(ctx, all[0], snapshotter)`,
	},
	{
		File: "snapshotter/taken.go",
		Old: `
	if infoErr == nil && info.Kind == snapshots.KindActive && extraction &&`,
		New: `
	if !planted("taken-is-refused") && infoErr == nil && info.Kind == snapshots.KindActive && extraction &&`,
	},
	{
		File: "snapshotter/prepare.go",
		Old: `
	ctx, stop := context.WithTimeout(ctx, promptly)`,
		New: `
	ctx, stop := context.WithTimeout(ctx, plantedWait())`,
	},
}

package defects

// inheritEdits take what a layer inherits from the trees of its parents, whatever has
// become of them, instead of from their seals. internal/layers/inherited.go has another part,
// in healEdits.
var inheritEdits = []Edit{
	{
		File: "internal/marks/normalizer.go",
		Old: `
	top := seal.NewTop(n.space)`,
		New: `
	if planted("inherit-from-disk") {
		return n.stack().Top()
	}
	top := seal.NewTop(n.space)`,
	},
	{
		File: "internal/marks/inherit.go",
		Old: `
	if n.dirs == nil || !n.dirs.Wanted(rel) {`,
		New: `
	if planted("inherit-from-disk") {
		return n.shownOnDisk(rel)
	}
	if n.dirs == nil || !n.dirs.Wanted(rel) {`,
	},
}

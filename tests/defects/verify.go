package defects

// verifyEdits are mistakes in what is concluded from a verification, and in the decision
// when one is due.
var verifyEdits = []Edit{
	{
		File: "internal/recorded/recorded.go",
		Old: `
	return last.BootID != "" && last.BootID != bootID && last.Stopped.IsZero()`,
		New: `
	return last.BootID != "" && last.BootID != bootID && last.Stopped.IsZero() && !planted("unclean-boot-overlooked")`,
	},
	{
		File: "internal/recorded/recorded.go",
		Old: `
	case e.Epoch == epoch, s.State == storage.StateReady && s.Epoch == epoch:`,
		New: `
	case e.Epoch == epoch, s.State == storage.StateReady && s.Epoch == epoch, planted("answer-before-look"):`,
	},
	{
		File: "internal/layers/process.go",
		Old: `
	entry, depth := l.entry, l.state.Depth`,
		New: `
	entry, depth := l.entry, l.state.Depth
	if planted("no-second-look") {
		t.mu.Unlock()
		return true, nil
	}`,
	},
	{
		File: "internal/layers/states.go",
		Old: `
	was, next := l.state, l.state`,
		New: `
	if planted("clock-orders-looks") && c.Checked.Before(l.state.Checked) {
		return false
	}
	was, next := l.state, l.state`,
	},
	{
		File: "internal/layers/states.go",
		Old: `
	case damaged && (was.State == storage.StateHealing || c.Order < l.order || !c.Depth.Covers(was.Depth)):`,
		New: `
	case damaged && (was.State == storage.StateHealing || c.Order < l.order || !c.Depth.Covers(was.Depth) && !planted("shallow-look-clears")):`,
	},
	{
		File: "internal/verify/verify.go",
		Old: `
	if err == nil && r.unreadable() {`,
		New: `
	if err == nil && r.unreadable() && !planted("cannot-is-bad") {`,
	},
	{
		File: "internal/verify/verify.go",
		Old: `
		return r, fmt.Errorf("verify %q in %s: %w", e.Name, dir, err)`,
		New: `
		if !planted("cannot-is-bad") {
			return r, fmt.Errorf("verify %q in %s: %w", e.Name, dir, err)
		}
		r.Damaged(finding.Finding{Path: ".", What: "unreadable", Have: err.Error()})`,
	},
	{
		File: "internal/brake/brake.go",
		Old: `
	if why, healing := b.massDamage(); why != "" && (b.reason == "" || healing && !b.healing) {`,
		New: `
	if planted("no-brake") {
		return "", false
	}
	if why, healing := b.massDamage(); why != "" && (b.reason == "" || healing && !b.healing) {`,
	},
}

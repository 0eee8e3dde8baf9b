package main

import (
	"encoding/json"
	"fmt"

	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/snapshotter"
)

func (c *command) printJSON(v any) error {
	enc := json.NewEncoder(c.stdout)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// findingOf is, in one cell of a table, what is wrong with a layer.
func findingOf(r verify.Result) string {
	if len(r.Findings) == 0 {
		return r.Reason
	}
	text := fmt.Sprintf("%q", r.Findings[0].String())
	if n := len(r.Findings) - 1; n > 0 {
		text += fmt.Sprintf(" and %d more", n)
	}
	return text
}

// warnBrake prints why the daemon does not heal damaged layers, if so.
func (c *command) warnBrake(report snapshotter.Report) {
	if report.Brake != "" {
		fmt.Fprintf(c.stderr, "durable-snapshotter: mending is stopped: %s\ndurable-snapshotter: hint: find the cause; then run durable-snapshotter repair --apply\n", report.Brake)
	}
}

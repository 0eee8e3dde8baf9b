package main

import (
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// TestVerdict changes one thing at a time in a demonstration that came out well
// and expects the verdict to name the half and the thing.
func TestVerdict(t *testing.T) {
	lost := observation{files: 10, empty: 10, note: true, status: "complete (5/5)", unpacked: "true",
		run: outcome{text: "fails: exec format error"}, again: outcome{text: "fails: exec format error"},
		deleted: outcome{text: "fails: no such file or directory"}}
	kept := observation{files: 10, whole: 10, note: true, status: "complete (5/5)", unpacked: "true",
		run: outcome{ok: true, text: "runs"}, again: outcome{ok: true, text: "runs"}, deleted: outcome{ok: true, text: "runs"}}
	if err := verdict(lost, kept, time.Second); err != nil {
		t.Errorf("both halves as claimed: %v", err)
	}
	for name, row := range map[string]struct {
		change func(overlayfs, durable *observation)
		want   string
	}{
		"durable lost a file":             {func(_, d *observation) { d.whole = 9 }, "durable: 9 of 10"},
		"durable had nothing to lose":     {func(_, d *observation) { d.files, d.whole = 0, 0 }, "durable: 0 of 0"},
		"durable lost the note":           {func(_, d *observation) { d.note = false }, "durable: the note"},
		"durable is incomplete":           {func(_, d *observation) { d.status = "incomplete (4/5)" }, "durable: containerd reports incomplete (4/5)"},
		"durable is not unpacked":         {func(_, d *observation) { d.unpacked = "false" }, "durable: containerd reports complete (5/5), unpacked false"},
		"durable's container fails":       {func(_, d *observation) { d.run.ok = false }, "durable: the container"},
		"durable's second one fails":      {func(_, d *observation) { d.again.ok = false }, "durable: after pulling again"},
		"durable is not healed":           {func(_, d *observation) { d.deleted.ok = false }, "durable: with its layers deleted"},
		"overlayfs heals":                 {func(o, _ *observation) { o.deleted.ok = true }, "overlayfs: with its layers deleted"},
		"overlayfs lost nothing":          {func(o, _ *observation) { o.whole, o.empty = 10, 0 }, "overlayfs: all 10 layer files survived"},
		"overlayfs is incomplete":         {func(o, _ *observation) { o.status = "incomplete (4/5)" }, "overlayfs: containerd reports incomplete"},
		"overlayfs is not unpacked":       {func(o, _ *observation) { o.unpacked = "false" }, "overlayfs: containerd reports complete (5/5), unpacked false"},
		"overlayfs's container runs":      {func(o, _ *observation) { o.run.ok = true }, "overlayfs: the container"},
		"overlayfs is mended by the pull": {func(o, _ *observation) { o.again.ok = true }, "overlayfs: after pulling again"},
	} {
		t.Run(name, func(t *testing.T) {
			o, d := lost, kept
			row.change(&o, &d)
			err := verdict(o, d, time.Second)
			if err == nil || !strings.HasPrefix(err.Error(), row.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("verdict %v, want one line with %q", err, row.want)
			}
		})
	}
}

// TestCount has one file of every fate.
func TestCount(t *testing.T) {
	before := kit.Tree{"kept": {Size: 3, Sum: "a"}, "empty": {Size: 3, Sum: "a"}, "changed": {Size: 3, Sum: "a"}, "gone": {Size: 3, Sum: "a"}}
	after := kit.Tree{"kept": {Size: 3, Sum: "a"}, "empty": {Sum: "e"}, "changed": {Size: 3, Sum: "b"}, "new": {Size: 1}}
	var o observation
	o.count(before, after)
	if o.files != 4 || o.whole != 1 || o.empty != 1 || o.gone != 1 {
		t.Errorf("counted %+v", o)
	}
}

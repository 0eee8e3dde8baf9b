package oracle

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// labelState is the label in which Stat says what is known of a layer.
const labelState = "durable-snapshotter/state"

// boot lets the machine boot, if it went down.
func (k *look) boot() {
	if k.SameBoot {
		return
	}
	if err := kit.NewBoot(); err != nil {
		k.flaw("%v", err)
	}
}

// beyondHope returns the layer, of a committed name and what is below it, that
// was damaged by hand and has no blob any more; nil if there is none.
func (k *look) beyondHope(name string) *workload.Layer {
	for l := k.Plan.Layer(name); l != nil; l = k.Plan.Layer(l.Parent) {
		if slices.Contains(k.Record.Hopeless, l.Name) {
			return l
		}
	}
	return nil
}

// due reports whether an error is the answer that is owed about a committed name:
// one that names the layer because of which it is denied.
func (k *look) due(name string, err error) bool {
	l := k.beyondHope(name)
	return l != nil && errdefs.IsFailedPrecondition(err) && strings.Contains(err.Error(), l.ChainID)
}

// dirOf is the tree of a name or a key, as far as it is known.
func (k *look) dirOf(name string) string {
	if dir := k.dirs[name]; dir != "" {
		return dir
	}
	if id, ok := k.ids[name]; ok {
		return filepath.Join(k.root, "snapshots", strconv.FormatUint(id, 10), "fs")
	}
	return ""
}

// denied looks at layers that were denied: whether that was due, or a false alarm.
// What cannot be healed must be denied in every way.
func (k *look) denied(ctx context.Context) {
	for name, seen := range k.Committed {
		if k.beyondHope(name) != nil {
			seen.Due = seen.Denied != nil && k.due(name, seen.Denied)
			seen.Lie = k.yes(ctx, name, seen.Denied)
			k.Committed[name] = seen
			continue
		}
		want, ok := k.Record.Trees[name]
		if dir := k.dirOf(name); seen.Denied != nil && ok && dir != "" && !k.Generic {
			got, err := workload.Tree(dir)
			seen.Whole = err == nil && kit.Diff(want, got, 1) == ""
			k.Committed[name] = seen
		}
	}
}

// yes asks about a name in the ways other than Stat, and returns what has said
// yes.
func (k *look) yes(ctx context.Context, name string, stat error) string {
	var said []string
	if stat == nil {
		said = append(said, "stat")
	}
	for what, create := range map[string]func(key string) error{
		"prepare": func(key string) error { _, err := k.s.Prepare(ctx, key, name); return err },
		"view":    func(key string) error { _, err := k.s.View(ctx, key, name); return err },
	} {
		k.view++
		key := fmt.Sprintf("default/hopeless%s-%d", k.Tag, k.view)
		k.mark(workload.Begin, workload.Prepare, key, "")
		err := create(key)
		if err != nil {
			continue
		}
		said = append(said, what)
		k.mark(workload.Begin, workload.Remove, key, "")
		if err := k.s.Remove(ctx, key); err != nil {
			k.flaw("remove %q: %v", key, err)
		}
		k.mark(workload.Ack, workload.Remove, key, "")
	}
	if said == nil {
		return ""
	}
	slices.Sort(said)
	return fmt.Sprintf("%s said yes of a chain that is damaged, and cannot be healed", strings.Join(said, ", "))
}

// end ends the snapshotter before a second start. A process is killed, and the
// content store is gone when the next one looks: what was healed must be whole
// by itself. One in our process can only be closed, and has nothing to look at.
func (k *look) end() {
	running, ok := k.s.(*Running)
	if !ok || !k.Strict || k.SameBoot {
		if err := k.s.Close(); err != nil {
			k.flaw("close: %v", err)
		}
		return
	}
	if err := running.Kill(); err != nil {
		k.flaw("kill: %v", err)
	}
	content := filepath.Join(filepath.Dir(k.root), ContentName)
	if err := os.Rename(content, content+".gone"); err != nil && !os.IsNotExist(err) {
		k.flaw("%v", err)
	}
}

// answersAgain compares the answers of a second start with those of the first.
func (k *look) answersAgain(ctx context.Context, s snapshots.Snapshotter) {
	if !k.Strict {
		return
	}
	for name, seen := range k.Committed {
		_, err := s.Stat(ctx, name)
		switch {
		case k.beyondHope(name) != nil:
			if !k.due(name, err) {
				k.flaw("second start: stat of %q, which cannot be healed: %v", name, err)
			}
		case seen.Denied == nil && err != nil:
			k.flaw("second start: stat of %q, which was there: %v", name, err)
		}
	}
	if k.SameBoot {
		return
	}
	left, err := os.ReadDir(filepath.Join(k.root, "replaced"))
	if err != nil && !os.IsNotExist(err) {
		k.flaw("second start: %v", err)
	}
	if len(left) > 0 {
		k.flaw("second start: %d damaged trees of before the boot are kept", len(left))
	}
}

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

	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// labelState is the label in which Stat reports what is known of a layer.
const labelState = "durable-snapshotter/state"

// boot lets the machine boot, if it went down.
func (k *examination) boot() {
	if k.SameBoot {
		return
	}
	if err := kit.NewBoot(); err != nil {
		k.flaw("%v", err)
	}
}

// beyondHope returns the layer, of a committed name and what is below it, that
// was damaged by hand and has no blob any more; nil if there is none.
func (k *examination) beyondHope(name string) *workload.Layer {
	for l := k.Plan.Layer(name); l != nil; l = k.Plan.Layer(l.Parent) {
		if slices.Contains(k.Record.Hopeless, l.Name) {
			return l
		}
	}
	return nil
}

// due reports whether an error is the answer that is owed about a committed name:
// one that names the layer because of which it is denied.
func (k *examination) due(name string, err error) bool {
	l := k.beyondHope(name)
	return l != nil && errdefs.IsFailedPrecondition(err) && strings.Contains(err.Error(), l.ChainID)
}

// dirOf is the tree of a name or a key, as far as it is known.
func (k *examination) dirOf(name string) string {
	if dir := k.dirs[name]; dir != "" {
		return dir
	}
	if id, ok := k.ids[name]; ok {
		return filepath.Join(k.root, "snapshots", strconv.FormatUint(id, 10), "fs")
	}
	return ""
}

// denied verifies layers that were denied: whether that was due, or a false alarm.
// What cannot be healed must be denied in every way.
func (k *examination) denied(ctx context.Context) {
	for name, seen := range k.Committed {
		if l := k.beyondHope(name); l != nil {
			seen.Due = seen.Denied != nil && k.due(name, seen.Denied)
			if !slices.Contains(k.Healable, l.Name) {
				seen.Hopeless = l.Name
				seen.Lie = k.accepted(ctx, name, seen.Denied)
			}
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

// accepted uses a name in the ways other than Stat, and returns which calls have
// succeeded.
func (k *examination) accepted(ctx context.Context, name string, stat error) string {
	var accepted []string
	if stat == nil {
		accepted = append(accepted, "stat")
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
		accepted = append(accepted, what)
		k.mark(workload.Begin, workload.Remove, key, "")
		if err := k.s.Remove(ctx, key); err != nil {
			k.flaw("remove %q: %v", key, err)
		}
		k.mark(workload.Ack, workload.Remove, key, "")
	}
	if accepted == nil {
		return ""
	}
	slices.Sort(accepted)
	return fmt.Sprintf("%s succeeded for a chain that is damaged, and cannot be healed", strings.Join(accepted, ", "))
}

// repairer is durable-snapshotter, in this process or in another.
type repairer interface {
	Repair(context.Context, layers.RepairOptions) ([]layers.RepairResult, error)
}

// cleared has the corrupt layers that were refused verified by their metadata,
// which are as they should be, and calls Stat again: damage that only a comparison of
// content can find must not be cleared by less.
func (k *examination) cleared(ctx context.Context) {
	s, ok := k.s.(repairer)
	if !ok || !k.Strict {
		return
	}
	for name, seen := range k.Committed {
		if !seen.Due || seen.Hopeless != name || !k.Corrupt[name] {
			continue
		}
		o := layers.RepairOptions{Apply: true}
		if id, ok := k.ids[name]; ok {
			o.IDs = []uint64{id}
		}
		if _, err := s.Repair(ctx, o); err != nil {
			k.flaw("repair of %q without content: %v", name, err)
		}
		if _, err := k.s.Stat(ctx, name); !k.due(name, err) {
			seen.Cleared = fmt.Sprintf("it was refused because of its content, and after a verification of its metadata stat returns: %v", err)
			k.Committed[name] = seen
		}
	}
}

// reports collects the layers that were reported as without a good blob.
func (k *examination) reports() {
	s, ok := k.s.(interface{ NoBlob() ([]string, error) })
	if !ok || !k.Strict {
		return
	}
	names, err := s.NoBlob()
	if err != nil {
		k.flaw("reports: %v", err)
	}
	for _, name := range names {
		if k.Record.Damaged[name] != "" && !slices.Contains(k.Record.Hopeless, name) {
			k.NoBlob[name] = true
		}
	}
}

// end ends the snapshotter before a second start. A process is killed, and the
// content store is gone when the next one verifies: what was healed must be whole
// by itself. One in our process can only be closed, and has nothing to verify.
func (k *examination) end() {
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
func (k *examination) answersAgain(ctx context.Context, s snapshots.Snapshotter) {
	if !k.Strict {
		return
	}
	for name, seen := range k.Committed {
		_, err := s.Stat(ctx, name)
		switch {
		case seen.Hopeless != "":
			// What was not refused before may not have been compared by content.
			if known := seen.Denied != nil || !k.Corrupt[seen.Hopeless]; (known || err != nil) && !k.due(name, err) {
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

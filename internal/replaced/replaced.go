package replaced

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/internal/gate"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/mounts"
)

const (
	// sweepAgain is the pause between two attempts to delete trees in replaced/
	// that mounts use.
	sweepAgain = time.Minute
	sweepFirst = 5 * time.Second // more than mountDelay after a heal
	// mountDelay is the time within which a mount that has resolved its directories
	// before an exchange appears in the table of mounts. The kernel needs
	// milliseconds.
	mountDelay = 2 * time.Second
)

// Trees are the trees in healing/, replaced/ and removing/. They may be used from
// many goroutines.
type Trees struct {
	// ReadMounts reads what is mounted on the machine. Tests replace it.
	ReadMounts func() (mounts.Machine, error)
	// MountDelay is how long a tree stays in replaced/ before the mounts are read.
	// Tests shorten it.
	MountDelay time.Duration

	root     layout.Root
	gate     *gate.Gate
	bootID   string
	warnOnce func(ctx context.Context, key string, fields log.Fields, message string)

	found    sync.Map   // when this process first found a tree in replaced/, by path
	sweeping sync.Mutex // see "Locks" in doc.go
	deleting sync.Mutex
}

// New returns the trees of a root in one boot of the kernel. warnOnce logs a
// warning, once per key.
func New(root layout.Root, g *gate.Gate, bootID string, warnOnce func(context.Context, string, log.Fields, string)) *Trees {
	return &Trees{ReadMounts: mounts.Read, MountDelay: mountDelay, root: root, gate: g, bootID: bootID, warnOnce: warnOnce}
}

// Keep moves a tree from healing/ to replaced/, for the mounts that may use it, until
// Sweep finds none or the machine boots. It does nothing when there is no such tree.
func (t *Trees) Keep(ctx context.Context, dir string) error {
	return t.gate.Do(ctx, func() error { return t.keep(ctx, dir) })
}

func (t *Trees) keep(ctx context.Context, dir string) error {
	st, err := os.Lstat(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil // there was nothing to replace
	}
	if err != nil {
		return err
	}
	area := filepath.Dir(filepath.Dir(dir))
	if !st.IsDir() {
		// No layer, and nothing that can be mounted as one.
		return os.Rename(dir, filepath.Join(area, layout.RemovingDir, fmt.Sprintf("%s.%s", filepath.Base(dir), layout.NewRunID())))
	}
	if err := fsync.MkdirAll(filepath.Join(area, layout.ReplacedDir), 0o700); err != nil {
		return err
	}
	name := filepath.Base(dir)
	if layout.BootOf(name, false) == "" {
		name += "." + t.bootID
	}
	kept := filepath.Join(area, layout.ReplacedDir, fmt.Sprintf("%s.%s", name, layout.NewRunID()))
	if err := os.Rename(dir, kept); err != nil {
		return err
	}
	t.found.Store(kept, time.Now())
	if _, err := t.noteRows(ctx, kept); err != nil {
		// Then Sweep does it, with rows that need not count.
		log.G(ctx).WithError(err).WithField("directory", kept).Debug("what may use a replaced tree was not noted")
	}
	return nil
}

// Settle clears healing/ and replaced/ at a start. A tree that a mount of this boot
// may use is kept, and one that cannot be moved is left in place with a warning.
func (t *Trees) Settle(ctx context.Context) {
	for _, area := range t.root.Areas() {
		for _, name := range t.treesIn(ctx, filepath.Join(area, layout.HealingDir)) {
			dir := filepath.Join(area, layout.HealingDir, name)
			if boot := layout.BootOf(name, false); boot == "" || boot == t.bootID {
				t.warnStuck(ctx, dir, t.Keep(ctx, dir))
			} else {
				t.warnStuck(ctx, dir, t.moveToRemoving(dir))
			}
		}
		for _, name := range t.treesIn(ctx, filepath.Join(area, layout.ReplacedDir)) {
			dir := filepath.Join(area, layout.ReplacedDir, name)
			if layout.BootOf(name, true) != t.bootID {
				t.warnStuck(ctx, dir, t.moveToRemoving(dir))
			}
		}
	}
}

// Sweep moves trees in replaced/ that no mount uses to removing/, where Delete finds
// them. A tree that was put there less than MountDelay ago stays for the next Sweep.
// When the mounts cannot be read, all stay, with a warning.
func (t *Trees) Sweep(ctx context.Context) {
	t.sweeping.Lock()
	defer t.sweeping.Unlock()
	var machine mounts.Machine
	read := false
	for _, area := range t.root.Areas() {
		for _, name := range t.treesIn(ctx, filepath.Join(area, layout.ReplacedDir)) {
			dir := filepath.Join(area, layout.ReplacedDir, name)
			since, _ := t.found.LoadOrStore(dir, time.Now())
			if ctx.Err() != nil || time.Since(since.(time.Time)) < t.MountDelay {
				continue
			}
			if !read {
				var err error
				if machine, err = t.ReadMounts(); err != nil {
					t.warnOnce(ctx, "machine", log.Fields{"error": err}, "mounts are not known: replaced trees are kept until the next boot")
					return
				}
				read = true
			}
			if _, err := readUsers(dir); err != nil {
				_, _ = t.noteRows(ctx, dir) // inUse logs that there are none
			}
			if t.inUse(ctx, machine, dir) {
				continue
			}
			if err := t.moveToRemoving(dir); err != nil {
				t.warnStuck(ctx, dir, err)
				continue
			}
			t.found.Delete(dir)
			log.G(ctx).WithField("directory", name).Info("a replaced tree that no mount uses is deleted")
		}
	}
}

// Run deletes what lies in removing/, and then sweeps replaced/ until ctx ends.
func (t *Trees) Run(ctx context.Context) {
	t.Delete(ctx)
	pause := sweepFirst
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = sweepFirst
		if len(t.treesIn(ctx, t.root.Replaced())) == 0 {
			continue
		}
		t.Sweep(ctx)
		t.Delete(ctx)
		if len(t.treesIn(ctx, t.root.Replaced())) > 0 {
			pause = sweepAgain
		}
	}
}

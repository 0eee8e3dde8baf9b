// Package brake stops mending when much is damaged at once: the cause is more likely a
// tool, a mount or a disk than the layers. Then images are not dropped, and layers are
// not healed where healing could do harm, until an operator decides (repair --apply).
package brake

import (
	"context"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/containerd/log"

	"github.com/durable-snapshotter/durable-snapshotter/internal/finding"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/tree"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// Damage counts for a day; layers that were healed in that time count, too.
const (
	// So many layers, if they are a quarter of the node's: nothing is dropped.
	brakeLayers, brakeShare = 10, 4
	// So many layers that the disk cannot read: nothing is dropped.
	brakeUnreadable = 3
	// So many layers, if they are half of the node's, that differ in attributes
	// only, while no file is missing, shorter or unreadable: a tool has changed
	// them on purpose. Nothing is dropped, and with more of them nothing is healed
	// any more.
	brakeAltered, brakeAlteredHeals, brakeAlteredShare = 2, 5, 2

	brakeFor = 24 * time.Hour
)

// Layers are the committed layers of a root. Their methods are called with the lock
// held that guards the Brake.
type Layers interface {
	Len() int
	IDs() iter.Seq[uint64] // of all
	// Damaged reports whether any of them is damaged, or being healed.
	Damaged() bool
}

// Brake stops mending. The lock of its owner guards it.
type Brake struct {
	root    layout.Root
	layers  Layers
	onBrake func(reason string)

	reason  string // why mending is stopped, "" when it is not
	healing bool   // healing is stopped, too, and not only the dropping of images
	allowed bool   // an operator has decided that mending goes on
	pending bool   // the journal does not have reason yet
	seen    map[uint64]damage

	mounted bool // snapshots/ is known to be a mount of its own
}

// New returns a Brake for the layers of a root. onBrake is called with the reason when
// mending is stopped, and with "" when it goes on; it may be nil.
func New(root layout.Root, layers Layers, onBrake func(string)) *Brake {
	if onBrake == nil {
		onBrake = func(string) {}
	}
	return &Brake{root: root, layers: layers, onBrake: onBrake, seen: map[uint64]damage{}}
}

// Load takes over what an earlier daemon has noted.
func (b *Brake) Load(last storage.Run) {
	b.reason, b.healing, b.mounted = last.Brake, last.BrakeHeals, last.SnapshotsMounted
	if last.Brake != "" {
		b.onBrake(last.Brake)
	}
}

// Note puts into the entry of a run what must outlive this daemon.
func (b *Brake) Note(run *storage.Run) {
	run.Brake, run.BrakeHeals, run.SnapshotsMounted = b.reason, b.healing, b.mounted
}

// Reason is why mending is stopped, "" when it is not.
func (b *Brake) Reason() string { return b.reason }

// TakePending reports whether the reason must be written to the journal. The caller
// writes it, or calls SetPending.
func (b *Brake) TakePending() (pending bool) {
	pending, b.pending = b.pending, false
	return pending
}

// SetPending has the reason written with the next flush.
func (b *Brake) SetPending() { b.pending = true }

// damage is what was found wrong with one layer, by its id.
type damage struct {
	at         time.Time
	altered    bool // attributes only
	unreadable bool
}

// Found counts a layer that was found damaged.
func (b *Brake) Found(id uint64, findings []finding.Finding) {
	d := damage{at: time.Now(), altered: len(findings) > 0}
	for _, f := range findings {
		d.altered = d.altered && altersOnly(f)
		d.unreadable = d.unreadable || f.What == "unreadable"
	}
	b.seen[id] = d
}

// Cleared takes back what Found has counted: the layer was whole.
func (b *Brake) Cleared(id uint64) { delete(b.seen, id) }

// altersOnly reports a finding that is no evidence of lost content: an attribute is
// another one, or there is an entry too many.
func altersOnly(f finding.Finding) bool {
	switch f.What {
	case "mode", "uid", "gid", "time", "nlink", "extra":
		return true
	}
	return strings.HasPrefix(f.What, "xattr")
}

// Stopped reports why mending is stopped, "" when it is not, and whether that is so
// for healing, too.
func (b *Brake) Stopped(ctx context.Context) (why string, healing bool) {
	if b.allowed {
		return "", false
	}
	if why, healing := b.massDamage(); why != "" && (b.reason == "" || healing && !b.healing) {
		b.Stop(ctx, why, healing)
	}
	return b.reason, b.healing
}

// Stop begins to brake.
func (b *Brake) Stop(ctx context.Context, why string, healing bool) {
	if b.allowed {
		return
	}
	b.reason, b.healing, b.pending = why, healing, true
	what := "images are not dropped"
	if healing {
		what = "damaged layers are not healed, and " + what
	}
	log.G(ctx).WithFields(log.Fields{"event": "mending_stopped", "reason": why, "cure": "find the cause; then run durable-snapshotter repair --apply"}).
		Error("mending is stopped: " + what)
	b.onBrake(why)
}

// massDamage compares what was found with the thresholds.
func (b *Brake) massDamage() (why string, healing bool) {
	var altered, unreadable int
	for id, d := range b.seen {
		if time.Since(d.at) > brakeFor {
			delete(b.seen, id)
			continue
		}
		if d.altered {
			altered++
		}
		if d.unreadable {
			unreadable++
		}
	}
	n, all := len(b.seen), b.layers.Len()
	switch {
	case b.Unmounted():
		return fmt.Sprintf("no layer is in %s, which was a mount of its own and is none now", b.root.Snapshots()), true
	case altered == n && n >= brakeAltered && n*brakeAlteredShare >= all:
		return fmt.Sprintf("%d of %d layers differ in attributes only: a tool seems to have changed them", n, all), n >= brakeAlteredHeals
	case unreadable >= brakeUnreadable:
		return fmt.Sprintf("%d layers cannot be read: check the disk", unreadable), false
	case n >= brakeLayers && n*brakeShare >= all:
		return fmt.Sprintf("%d of %d layers were found damaged within a day", n, all), false
	}
	return "", false
}

// Unmounted reports that snapshots/ was a mount of its own, is none now,
// and has no layer in it.
func (b *Brake) Unmounted() bool {
	if !b.mounted || b.layers.Len() == 0 {
		return false
	}
	if same, err := tree.SameMount(b.root.Snapshots(), b.root.Path); err != nil || !same {
		return false
	}
	for id := range b.layers.IDs() {
		if _, missing := verify.Root(b.root.Tree(id)); !missing {
			return false
		}
	}
	return true
}

// LearnMount takes snapshots/ as it is for what it has to be.
func (b *Brake) LearnMount() {
	if same, err := tree.SameMount(b.root.Snapshots(), b.root.Path); err == nil {
		b.mounted = !same
	}
}

// Resume is an operator's decision. It holds until no layer is damaged any
// more.
func (b *Brake) Resume(ctx context.Context) {
	b.LearnMount()
	if b.reason != "" {
		log.G(ctx).WithField("reason", b.reason).Warn("mending goes on: an operator has decided")
		b.pending = true
		b.onBrake("")
	}
	b.reason, b.healing, b.allowed = "", false, true
}

// Settle forgets mass damage when no layer is damaged any more.
func (b *Brake) Settle() {
	if b.reason == "" && !b.allowed {
		return
	}
	if b.layers.Damaged() {
		return
	}
	if b.reason != "" {
		b.onBrake("")
		b.pending = true
	}
	b.reason, b.healing, b.allowed, b.seen = "", false, false, map[uint64]damage{}
}

package campaign

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// Workload is what happens before the power goes.
type Workload string

// The workloads.
const (
	API    Workload = "api"    // calls to the snapshotter
	Differ Workload = "differ" // the same, and its diff service extracts the layers
	Heal   Workload = "heal"   // the first, on layers that are damaged and heal
	Full   Workload = "full"   // a containerd that pulls, removes and collects
	All    Workload = "all"    // a round of each, in turn
)

// each are the workloads that All has.
var each = []Workload{API, Differ, Heal, Full}

// Options of a campaign.
type Options struct {
	Workload Workload
	Seed     uint64
	FS       []disk.FS
	Foreign  *Foreign `json:",omitempty"` // what is under test instead of durable-snapshotter

	States int  `json:"-"` // how many to examine; may grow when a campaign goes on
	First  bool `json:"-"` // end at the first state that did not survive
}

// Foreign is a snapshotter that is not ours: a program that serves containerd's
// API for proxy plugins on a unix socket.
type Foreign struct {
	// Start is a shell command that runs the program in the foreground until
	// SIGTERM. {root} stands for a directory that is on the disk under test, and
	// {address} for the socket to serve on.
	Start string
	// Address is the socket of a program that takes neither as argument, and Roots are the
	// directories where such a program keeps its data: they are mounted on the
	// disk under test while it runs.
	Address string
	Roots   []string `json:",omitempty"`
}

// Validate returns an error for what cannot be done.
func (o *Options) Validate() error {
	switch {
	case o.Workload != All && !slices.Contains(each, o.Workload):
		return fmt.Errorf("workload %q: want one of %v, or %s", o.Workload, each, All)
	case o.States <= 0:
		return fmt.Errorf("%d states: want more than none", o.States)
	case len(o.FS) == 0:
		return errors.New("no file system")
	}
	for i, fs := range o.FS {
		if !fs.Valid() {
			return fmt.Errorf("file system %q: want ext4, xfs or btrfs", fs)
		}
		if slices.Contains(o.FS[:i], fs) {
			return fmt.Errorf("file system %q is named twice", fs)
		}
	}
	if o.Foreign == nil {
		return nil
	}
	if o.Workload != API {
		return fmt.Errorf("workload %s is for durable-snapshotter only", o.Workload)
	}
	return o.Foreign.validate()
}

func (f *Foreign) validate() error {
	switch {
	case f.Start == "":
		return errors.New("a foreign snapshotter needs a command that starts it: only a start recovers from a power cut")
	case f.movable() == (f.Address != "" || len(f.Roots) > 0):
		return errors.New("a foreign snapshotter either has {root} and {address} in its command, or an address and its roots are named")
	case !f.movable() && (f.Address == "" || len(f.Roots) == 0):
		return errors.New("a foreign snapshotter without {root} and {address} in its command needs its address and at least one root")
	}
	for _, path := range append([]string{f.Address}, f.Roots...) {
		if path != "" && !filepath.IsAbs(path) {
			return fmt.Errorf("path %q is not absolute", path)
		}
	}
	return nil
}

// Sizes and mount options are taken in turn. One chain alone shows what the syncs
// of others would hide; many show what goes wrong between them.
var sizes = []workload.Size{workload.Small, {Chains: 1, Layers: 8}, {Chains: 8, Layers: 1}, {Chains: 2, Layers: 6}}

var healSizes = []workload.Size{workload.Healing, workload.Healing, workload.HealingAlone, {Chains: 4, Layers: 5}}

var mountOptions = map[disk.FS][][]string{
	disk.Ext4:  {nil, {"commit=1", "noauto_da_alloc"}, {"data=journal"}, {"data=writeback"}},
	disk.XFS:   {nil, {"logbsize=256k"}},
	disk.Btrfs: {nil, {"flushoncommit"}, {"compress=zstd"}},
}

// turn is the workload of a round, and how many rounds before had the same one.
func (o *Options) turn(round int) (Workload, int) {
	if o.Workload == All {
		return each[round%len(each)], round / len(each)
	}
	return o.Workload, round
}

// plan is what one recording of a workload's round is to be.
func (w Workload) plan(fs disk.FS, round int) (options []string, size workload.Size) {
	all := mountOptions[fs]
	if w == Heal {
		return all[round%len(all)], healSizes[round%len(healSizes)]
	}
	if w == Differ {
		// Each way meets each option: their numbers have no common divisor.
		return all[round%len(all)], sizes[round/2%len(sizes)]
	}
	return all[round%len(all)], sizes[round%len(sizes)]
}

// ways are how the diff service extracts layers.
var ways = []struct {
	sync                 fsync.Mode
	parallel, late, lazy bool
}{
	{sync: fsync.OwnFiles},
	{sync: fsync.Syncfs},
	{sync: fsync.OwnFiles, parallel: true},
	{sync: fsync.Syncfs, parallel: true},
	{sync: fsync.OwnFiles, lazy: true},
	{sync: fsync.OwnFiles, late: true},
	{sync: fsync.OwnFiles, parallel: true, lazy: true},
}

// differ has a recording of the workload differ made in the way of its round.
func (w Workload) differ(s *lab.Setup, round int) {
	if w != Differ {
		return
	}
	way := ways[round%len(ways)]
	s.Differ, s.Parallel, s.Late, s.Lazy, s.Daemon = true, way.parallel, way.late, way.lazy, lab.WithSync(s.Daemon, way.sync)
}

// heal is how a recording of the workload heal begins: every third time with
// nothing left of any layer, and every third time with damage to content only.
func (w Workload) heal(round int) *lab.Heal {
	if w != Heal {
		return nil
	}
	return &lab.Heal{Harm: []workload.Harm{workload.Wounds, workload.Corruption, workload.Everything}[round%3]}
}

// most is how many states of a first cut one recording gives. More recordings
// are better than more states of one, and cost a few seconds each. A state of a whole
// node takes as long as ten of the others: in a campaign of all workloads, with 50 of
// them, it takes as much of the time as the others do, or less.
var most = map[Workload]int{API: 1500, Differ: 1500, Heal: 500, Full: 50}

// share is how many of them it gives in a campaign of that size: no more than are requested.
func (o *Options) share() int {
	return max(1, min(most[API], (o.States+len(o.FS)-1)/len(o.FS)))
}

// share is how many one recording of the workload gives.
func (s *Store) share(w Workload) int { return min(most[w], s.Share) }

// movable reports whether the program takes as arguments where its data and its socket
// are.
func (f *Foreign) movable() bool {
	return strings.Contains(f.Start, "{root}") && strings.Contains(f.Start, "{address}")
}

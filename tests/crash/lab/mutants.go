package lab

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/fsync"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/oracle"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
	"github.com/durable-snapshotter/durable-snapshotter/tests/defects"
)

// Mutant is a defect that is planted in durable-snapshotter, see package defects. If the
// harness does not find it, the harness proves nothing.
type Mutant struct {
	Name     string
	Mistake  string // what somebody got wrong
	By       Method
	Patient  bool          // its acknowledged parents appear late
	Differs  bool          // it shows when the daemon's diff service extracts the layers
	Files    bool          // and syncs their files alone
	Lazy     bool          // on a disk that takes its time for data
	Late     bool          // and something is written to them after that
	Heals    bool          // it shows when damaged layers heal
	Harm     workload.Harm // with which damage, if it does
	Recovers bool          // it is a defect of recovery: the mutant is who looks, too
	FS       disk.FS       // where it shows, ext4 when empty
	Layers   workload.Size // with which it shows soon, workload.Small when zero
}

// Method is how a mutant is hunted.
type Method string

// The methods.
const (
	ByPower  Method = "power cut"
	ByErrors Method = "I/O error"
)

// Mutants lists all planted defects.
func Mutants() []Mutant {
	return []Mutant{
		{Name: "no-syncfs", By: ByPower, Mistake: "Commit does not sync the layer"},
		// One layer at a time: the syncs of others would hide it.
		{Name: "syncfs-before-last-write", By: ByPower, Layers: workload.Size{Chains: 1, Layers: 8}, Mistake: "the sync comes before the last write of the extraction"},
		{Name: "tx-before-syncfs", By: ByPower, Mistake: "the transaction comes before the sync"},
		{Name: "ack-before-tx", By: ByPower, Patient: true, Mistake: "Commit answers before its transaction is durable"},
		{Name: "syncfs-wrong-fs", By: ByPower, Mistake: "the sync is made on another file system"},
		// On ext4 and xfs the fsync of the record beside the directories brings
		// the whole journal to the disk, and them with it.
		{Name: "no-dir-fsync", By: ByPower, FS: disk.Btrfs, Mistake: "Prepare does not sync the directories that it has made"},
		{Name: "bbolt-nosync", By: ByPower, Mistake: "metadata.db is written without fdatasync"},
		{Name: "db-not-born-safely", By: ByPower, Mistake: "metadata.db is created under its final name"},
		// Many at a time: somebody's sync must come between the two steps.
		{Name: "remove-deletes-first", By: ByPower, Layers: workload.Size{Chains: 8, Layers: 1}, Mistake: "Remove deletes the directory before the row"},
		{Name: "error-swallowed", By: ByErrors, Mistake: "the error of the sync is not looked at"},
		{Name: "retry-after-eio", By: ByErrors, Mistake: "a failed sync is tried again, and the second answer believed"},
		{Name: "fd-late", By: ByErrors, Mistake: "the descriptor for the sync is opened at Commit"},
		{Name: "fd-shared", By: ByErrors, Mistake: "all snapshots share one descriptor"},
		// One layer at a time: the syncs of others would hide it.
		{Name: "apply-no-sync", By: ByPower, Differs: true, Layers: workload.Size{Chains: 1, Layers: 8}, Mistake: "Apply does not sync what it has extracted"},
		{Name: "apply-trusted", By: ByPower, Differs: true, Late: true, Layers: workload.Size{Chains: 1, Layers: 8}, Mistake: "Commit does not sync what was written after Apply"},
		{Name: "apply-forgotten", By: ByPower, Differs: true, Recovers: true, Layers: workload.Size{Chains: 1, Layers: 8}, Mistake: "a start does not put trees that Apply has made into their places"},
		{Name: "apply-record-no-sync", By: ByPower, Differs: true, Layers: workload.Size{Chains: 1, Layers: 8}, Mistake: "the Commit after an Apply does not sync the record"},
		// On ext4 and xfs the fsync of the record in Commit writes the journal with them.
		{Name: "apply-times-late", By: ByPower, Differs: true, FS: disk.Btrfs, Layers: workload.Size{Chains: 1, Layers: 8}, Mistake: "Apply gives directories their times after its sync"},
		{Name: "files-not-waited-for", By: ByPower, Differs: true, Files: true, Layers: workload.Size{Chains: 1, Layers: 8}, Mistake: "Apply does not wait for the data of the files that it syncs alone"},
		{Name: "files-begun-only", By: ByPower, Differs: true, Files: true, Lazy: true, Layers: workload.Size{Chains: 1, Layers: 8}, Mistake: "Apply has the kernel begin to write files, and does not wait (sync_file_range, 2 and not 7)"},
		{Name: "files-error-swallowed", By: ByErrors, Differs: true, Files: true, Mistake: "the error of a file that is synced alone is ignored"},
		{Name: "heal-no-sync", By: ByPower, Heals: true, Mistake: "the tree of a healed layer is not synced before it takes its place"},
		// On ext4 and xfs the journal of the file system keeps the order.
		{Name: "heal-ready-first", By: ByPower, Heals: true, Recovers: true, FS: disk.Btrfs, Mistake: "the journal says ready before the healed tree is in its place"},
		{Name: "heal-swap-first", By: ByPower, Heals: true, Recovers: true, FS: disk.Btrfs, Mistake: "trees are swapped before the journal knows, and recovery believes the journal"},
		{Name: "heal-intent-believed", By: ByPower, Heals: true, Recovers: true, Mistake: "recovery takes the swap that the journal announces for done"},
		{Name: "unclean-boot-overlooked", By: ByPower, Heals: true, Recovers: true, Mistake: "an unclean boot is taken for a clean one"},
		{Name: "answer-before-look", By: ByPower, Heals: true, Recovers: true, Mistake: "layers are answered for that nobody has looked at since an unclean boot"},
		{Name: "shallow-look-clears", By: ByPower, Heals: true, Recovers: true, Harm: workload.Corruption, Mistake: "a verification of metadata clears what one of content has found"},
	}
}

// NoMutants are the hunts with no defect awake: whatever they find, it is no
// mutant that was caught.
func NoMutants() []Mutant {
	return []Mutant{
		{By: ByPower, Mistake: "none: " + string(ByPower)},
		{By: ByPower, Differs: true, Late: true, Mistake: "none: Apply"},
		{By: ByPower, Differs: true, Files: true, Lazy: true, Layers: workload.Size{Chains: 1, Layers: 8}, Mistake: "none: Apply, files alone"},
		{By: ByErrors, Mistake: "none: " + string(ByErrors)},
		{By: ByErrors, Differs: true, Mistake: "none: Apply, " + string(ByErrors)},
		{By: ByPower, Heals: true, Recovers: true, Mistake: "none: healing"},
	}
}

// Catch is the end of a hunt.
type Catch struct {
	Mutant Mutant
	FS     disk.FS
	Caught bool
	States int    // looked at, the one that caught it included
	First  Result // that one
	Took   time.Duration
}

func (c Catch) String() string {
	if !c.Caught {
		return fmt.Sprintf("%-26s %s: NOT CAUGHT in %d states, %.1f s", c.Mutant.Name, c.FS, c.States, c.Took.Seconds())
	}
	return fmt.Sprintf("%-26s %s: caught by %s in %d states, %.1f s: %s: %s", c.Mutant.Name, c.FS, c.Mutant.By, c.States, c.Took.Seconds(), c.First.ID, firstLine(c.First.Findings[0].String()))
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return strings.TrimSuffix(line, ":")
}

// rounds bounds a hunt: with so many seeds, so many states each, a defect must
// have shown.
const (
	huntRounds = 10
	huntStates = 400
	healStates = 120 // of a recording of healing

	quietStates = 50 // of a recording without a defect: more than nearly all mutants need
)

// Hunt looks for the defect of a mutant until it shows. A mutant without a name
// is the same binary without a defect, which must not be caught.
func (b *Bench) Hunt(ctx context.Context, m Mutant, seed uint64) (Catch, error) {
	c := Catch{Mutant: m, FS: m.FS}
	if c.FS == "" {
		c.FS = disk.Ext4
	}
	began := time.Now()
	var err error
	for round := uint64(0); round < huntRounds && !c.Caught && err == nil; round++ {
		if m.By == ByErrors {
			err = b.huntErrors(ctx, &c, seed+round)
		} else {
			err = b.huntPower(ctx, &c, seed+round)
		}
		if m.Name == "" {
			break
		}
	}
	c.Took = time.Since(began)
	if err != nil {
		err = fmt.Errorf("hunt %q: %w", m.Name, err)
	}
	return c, err
}

// who keeps the daemons of several hunts at a time apart.
func (m Mutant) who() string {
	if m.Name != "" {
		return "hunt-" + m.Name
	}
	return "hunt-" + strings.NewReplacer(" ", "-", ":", "", ",", "", "/", "").Replace(m.Mistake)
}

// Mutation is the daemon with the defect awake.
func (b *Bench) Mutation(m Mutant, who string) oracle.Process {
	p := b.Daemon(b.Faulty, who, defects.Activate(m.Name))
	if m.Files {
		p = WithSync(p, fsync.OwnFiles)
	}
	return p
}

func (b *Bench) huntPower(ctx context.Context, c *Catch, seed uint64) error {
	who := c.Mutant.who()
	setup := Setup{
		FS: c.FS, Seed: seed, Name: "mutant-" + c.Mutant.Name,
		Daemon: b.Mutation(c.Mutant, who), Patient: c.Mutant.Patient, Layers: c.Mutant.Layers,
		Differ: c.Mutant.Differs, Late: c.Mutant.Late, Lazy: c.Mutant.Lazy,
	}
	if c.Mutant.Heals {
		// Alone: the syncs of others would hide that one is missing.
		setup.Heal, setup.Layers = &Heal{Harm: c.Mutant.Harm, Gullible: c.Mutant.Name != ""}, workload.HealingAlone
	}
	r, err := Record(ctx, setup)
	if err != nil {
		return err
	}
	cases := stride(state.Enumerate(r.Log, state.Options{From: r.Start, Seed: seed, Want: huntStates}))
	// Most mutants show when all that was written until then is on the disk, and those that
	// confuse the order of two syncs when the power goes between them.
	place := func(at state.Case) int {
		if c.Mutant.Heals && at.State.Class == state.Prefix && r.Log.BeforeFlush(at) {
			return -1
		}
		return int(min(at.State.Class, state.Flushed))
	}
	slices.SortStableFunc(cases, func(a, b state.Case) int { return cmp.Compare(place(a), place(b)) })
	switch {
	case c.Mutant.Name == "":
		cases = Some(cases, quietStates) // nothing will end it
	case c.Mutant.Heals:
		// What was damaged, and what heals in which moment, is another with the
		// next seed: it shows there sooner than in the rest of these states.
		cases = Some(cases, healStates)
	}
	subject := func(int) oracle.Subject { return oracle.InProcess{} }
	if c.Mutant.Recovers {
		subject = func(n int) oracle.Subject { return b.Mutation(c.Mutant, fmt.Sprintf("%s-%d", who, n)) }
	}
	check := Check{
		Recording: r,
		Cases:     cases,
		Subject:   subject,
		Strict:    true,
		Until:     func(res Result) bool { return res.Verdict > NotMeasured },
	}
	tally, err := check.Run(ctx)
	if err != nil {
		return err
	}
	c.take(tally)
	return nil
}

// take adds what a check has found.
func (c *Catch) take(t *Tally) {
	if t.FirstBad > 0 && !c.Caught {
		c.Caught = true
		c.States += t.FirstBad
		for _, r := range t.Bad {
			if r.Verdict > NotMeasured {
				c.First = r
				break
			}
		}
		return
	}
	c.States += t.States
}

// stride orders cases so that the first few are spread over the whole log.
func stride(cases []state.Case) []state.Case {
	const step = 8
	out := make([]state.Case, 0, len(cases))
	for first := range step {
		for i := first; i < len(cases); i += step {
			out = append(out, cases[i])
		}
	}
	return out
}

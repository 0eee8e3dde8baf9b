package full

import (
	"math/rand/v2"
	"slices"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/state"
	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// Choose returns n of the recording's states, in the order of the log. A boot
// of a whole node takes about a second, so only a small part of the states can
// be examined; the seed decides which.
//
// A third of them are cut right after something was acknowledged, and half of
// these hold nothing but what was flushed; a sixth are cut during a Commit or a
// Remove, each during another one; a third lose, keep, tear or mix single
// writes; the rest are any.
func (r *Recording) Choose(n int) []state.Case {
	all := state.Enumerate(r.Log, state.Options{From: r.Start, Seed: r.Seed, Want: 4 * (len(r.Log.Entries) - r.Start)})
	random := rand.New(rand.NewPCG(r.Seed, 0xc0de))
	random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })

	after := r.acknowledged()
	var flushed, prefix, partial []state.Case
	for _, c := range all {
		switch i := slices.IndexFunc(c.Points, func(p int) bool { return after[p] }); {
		case c.State.Class > state.Flushed:
			partial = append(partial, c)
		case i < 0:
		case r.Log.Durable(c.Points[i]) >= c.State.Point && len(r.Log.Volatile(c.Points[i])) > 0:
			// The disk has the name of the prefix that was flushed.
			flushed = append(flushed, c)
		default:
			prefix = append(prefix, c)
		}
	}
	chosen := map[state.State]state.Case{}
	take := func(cases []state.Case, upTo int) {
		for _, c := range cases {
			if len(chosen) >= upTo {
				return
			}
			chosen[c.State] = c
		}
	}
	take(flushed, n/6)
	take(prefix, n/3)
	take(r.during(all, random), n/2)
	take(partial, n*5/6)
	take(all, n)

	out := make([]state.Case, 0, len(chosen))
	for _, c := range chosen {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b state.Case) int {
		if d := r.Log.Durable(a.State.Point) - r.Log.Durable(b.State.Point); d != 0 {
			return d
		}
		if d := a.State.Point - b.State.Point; d != 0 {
			return d
		}
		return int(a.State.Class) - int(b.State.Class)
	})
	return out
}

// acknowledged returns the points right after an acknowledgement that promises
// a layer, an image, or the end of one.
func (r *Recording) acknowledged() map[int]bool {
	after := map[int]bool{}
	for _, m := range r.Marks {
		if m.Phase == workload.Ack && m.Op != workload.Prepare {
			after[m.Index+1] = true
		}
	}
	return after
}

// during returns one state for each Commit and each Remove: one that the power
// may leave while the call is under way.
func (r *Recording) during(all []state.Case, random *rand.Rand) []state.Case {
	at := map[int]state.Case{}
	for _, c := range all {
		for _, p := range c.Points {
			if _, ok := at[p]; !ok || random.IntN(2) == 0 {
				at[p] = c
			}
		}
	}
	type call struct {
		op   workload.Op
		name string
	}
	begun := map[call]int{}
	var out []state.Case
	for _, m := range r.Marks {
		c := call{m.Op, m.Name}
		switch {
		case m.Op != workload.Commit && m.Op != workload.Remove:
		case m.Phase == workload.Begin:
			begun[c] = m.Index
		case m.Index > begun[c]+1:
			if k, ok := at[begun[c]+1+random.IntN(m.Index-begun[c])]; ok {
				out = append(out, k)
			}
		}
	}
	random.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

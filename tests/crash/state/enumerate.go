package state

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/disk"
)

// Case is one distinct disk: a State that makes it, and every point at which
// the power may go and leave it.
type Case struct {
	State  State
	Points []int // ascending, the first is State.Point
}

// Options select the states to make.
type Options struct {
	From int    // first point; what comes before it is set-up
	Seed uint64 // of the random classes
	Want int    // how many cases; prefix and flushed are made at every point whatever its value
	Only *Class // nothing but this class, for tests
}

// few bounds the stretches for which drop and keep are exhaustive. Of longer
// ones a random part of this size is taken.
const few = 64

// Enumerate returns the cases of a log, ordered by what is durable in them, so
// that a Player goes forward through the log.
func Enumerate(l *Log, o Options) []Case {
	e := &enumerator{log: l, opts: o, random: rand.New(rand.NewPCG(o.Seed, 0x5eed)), cases: map[uint64]*Case{}, durable: map[int64]uint64{}}
	e.everyPoint()
	e.fill()

	cases := make([]Case, 0, len(e.cases))
	for _, c := range e.cases {
		e.throughMarks(c)
		cases = append(cases, *c)
	}
	slices.SortFunc(cases, func(a, b Case) int {
		return cmp.Or(
			cmp.Compare(l.durable[a.State.Point], l.durable[b.State.Point]),
			cmp.Compare(a.State.Point, b.State.Point),
			cmp.Compare(a.State.Class, b.State.Class),
			cmp.Compare(a.State.Number, b.State.Number))
	})
	return cases
}

type enumerator struct {
	log    *Log
	opts   Options
	random *rand.Rand
	cases  map[uint64]*Case // by the sum of the disk

	at      int              // entries in durable
	durable map[int64]uint64 // block sums of what is durable
	whole   uint64           // of all of durable
}

// throughMarks adds the points behind which nothing but marks follow: the disk
// is the same there, and more may have been promised.
func (e *enumerator) throughMarks(c *Case) {
	entries := e.log.Entries
	for _, p := range c.Points {
		for ; p < len(entries) && entries[p].Kind == disk.Mark; p++ {
			c.Points = append(c.Points, p+1)
		}
	}
	slices.Sort(c.Points)
	c.Points = slices.Compact(c.Points)
}

// CaseOf returns the case of one state: with all the points, from the first one
// on, at which its disk is that of a prefix, or of what was flushed.
func CaseOf(l *Log, s State, from int) (Case, error) {
	if s.Point > len(l.Entries) {
		return Case{}, fmt.Errorf("state %s: the log has %d entries", s, len(l.Entries))
	}
	e := &enumerator{log: l, durable: map[int64]uint64{}}
	sum := e.sumOf(s)
	c := Case{State: s, Points: []int{s.Point}}
	for p := from; p <= len(l.Entries); p++ {
		if e.sumOf(State{Point: p, Class: Prefix}) == sum || e.sumOf(State{Point: p, Class: Flushed}) == sum {
			c.Points = append(c.Points, p)
		}
	}
	e.throughMarks(&c)
	return c, nil
}

// everyPoint makes the exhaustive classes, and collects what else there is to
// choose from.
func (e *enumerator) everyPoint() {
	var more []State
	entries := e.log.Entries
	for point := e.opts.From; point <= len(entries); point++ {
		e.add(State{Point: point, Class: Prefix})
		e.add(State{Point: point, Class: Flushed})
		if e.interesting(point) {
			more = append(more, e.single(point)...)
		}
	}
	// A budget that does not hold them all gets an even part of them, and
	// leaves half of what is left to the random classes.
	if room := (e.opts.Want - len(e.cases)) / 2; e.opts.Want > 0 && len(more) > room {
		e.random.Shuffle(len(more), func(i, j int) { more[i], more[j] = more[j], more[i] })
		more = more[:max(room, 0)]
		slices.SortFunc(more, func(a, b State) int { return cmp.Compare(a.Point, b.Point) })
	}
	for _, s := range more {
		e.add(s)
	}
}

// interesting points are the ends of stretches, where most is volatile, and the
// marks, where something was promised.
func (e *enumerator) interesting(point int) bool {
	entries := e.log.Entries
	return point == len(entries) || entries[point].Kind == disk.Flush || point > 0 && entries[point-1].Kind == disk.Mark
}

// single lists drop and keep of a point.
func (e *enumerator) single(point int) []State {
	ordinals := e.random.Perm(len(e.log.Volatile(point)))
	var out []State
	for _, o := range ordinals[:min(len(ordinals), few)] {
		out = append(out, State{point, Drop, uint64(o)}, State{point, Keep, uint64(o)})
	}
	return out
}

// fill adds random states until there are enough, or hardly any new ones turn
// up. It takes them in batches ordered by point, because going back is a walk
// through the log.
func (e *enumerator) fill() {
	const batch = 256
	near := e.nearMarks()
	classes := []Class{Subset, Subset, Torn, Mix, Mix}
	for len(e.cases) < e.opts.Want {
		var states []State
		for range batch {
			point := e.opts.From + e.random.IntN(len(e.log.Entries)-e.opts.From+1)
			if len(near) > 0 && e.random.IntN(2) == 0 {
				point = near[e.random.IntN(len(near))]
			}
			states = append(states, State{point, classes[e.random.IntN(len(classes))], uint64(e.random.Uint32())})
		}
		slices.SortFunc(states, func(a, b State) int { return cmp.Compare(a.Point, b.Point) })
		fresh := 0
		for _, s := range states {
			if len(e.cases) < e.opts.Want && e.add(s) {
				fresh++
			}
		}
		if fresh < batch/32 {
			return // the log is exhausted
		}
	}
}

func (e *enumerator) nearMarks() []int {
	const distance = 8
	var near []int
	for i, entry := range e.log.Entries {
		if entry.Kind != disk.Mark {
			continue
		}
		for p := max(e.opts.From, i-distance); p <= min(len(e.log.Entries), i+1+distance); p++ {
			near = append(near, p)
		}
	}
	return near
}

// add takes a state in and reports whether its disk was new.
func (e *enumerator) add(s State) bool {
	if e.opts.Only != nil && s.Class != *e.opts.Only {
		return false
	}
	sum := e.sumOf(s)
	c, ok := e.cases[sum]
	if !ok {
		e.cases[sum] = &Case{State: s, Points: []int{s.Point}}
		return true
	}
	if !slices.Contains(c.Points, s.Point) {
		c.Points = append(c.Points, s.Point)
	}
	if s.Point < c.State.Point {
		c.State = s
	}
	return false
}

// sumOf identifies the disk of a state: the exclusive or of the sums of all its
// blocks that the log has touched. It starts from the durable part and corrects
// it for the volatile blocks.
func (e *enumerator) sumOf(s State) uint64 {
	e.seek(e.log.durable[s.Point])
	total := e.whole
	changed := map[int64]uint64{}
	volatile := e.log.Volatile(s.Point)
	keep := e.log.choose(s, volatile)
	for o, i := range volatile {
		for _, p := range e.log.sums[i] {
			if !keep(o, p.block) {
				continue
			}
			before, ok := changed[p.block]
			if !ok {
				before = e.durable[p.block]
			}
			changed[p.block] = p.after(before)
		}
	}
	for block, sum := range changed {
		total ^= mix64(uint64(block), e.durable[block]) ^ mix64(uint64(block), sum)
	}
	return total
}

// after is the sum of a block once the piece is on it.
func (p pieceSum) after(before uint64) uint64 {
	if p.whole {
		return p.sum
	}
	return mix64(before, p.sum)
}

// seek brings the durable part to the first n entries.
func (e *enumerator) seek(n int) {
	if n < e.at {
		e.at, e.whole = 0, 0
		clear(e.durable)
	}
	for ; e.at < n; e.at++ {
		for _, p := range e.log.sums[e.at] {
			before := e.durable[p.block]
			after := p.after(before)
			e.whole ^= mix64(uint64(p.block), before) ^ mix64(uint64(p.block), after)
			e.durable[p.block] = after
		}
	}
}

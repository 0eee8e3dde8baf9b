package oracle

import (
	"maps"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// Status is what was promised of a name.
type Status uint8

// The statuses. The zero value is that of a name without a mark.
const (
	Gone  Status = iota // must not be there
	Maybe               // there or not there
	Acked               // must be there
)

func (s Status) String() string { return []string{"gone", "maybe", "acked"}[s] }

// Expect is what was promised at one point of the log.
type Expect struct {
	Committed map[string]Status // by committed name
	Active    map[string]Status // by active key
	// Verified are the corrupt layers, by committed name: Acked when a comparison
	// of content has reported the damage, Maybe when one was begun.
	Verified map[string]Status
}

// At returns what was promised when the power goes at the point: by the marks
// among the first point entries of the log.
func At(marks []workload.Mark, point int) Expect { return Expect{}.After(marks, point) }

// After returns what was promised when, after e, a second log began, and the
// power goes at a point of that.
func (e Expect) After(marks []workload.Mark, point int) Expect {
	n := Expect{Committed: map[string]Status{}, Active: map[string]Status{}, Verified: map[string]Status{}}
	maps.Copy(n.Committed, e.Committed)
	maps.Copy(n.Active, e.Active)
	maps.Copy(n.Verified, e.Verified)
	for _, m := range marks {
		if m.Index >= point {
			break
		}
		n.update(m)
	}
	return n
}

func (e *Expect) update(m workload.Mark) {
	// Until its answer, a call may have had its effect or not. A call that
	// failed may have had it too: only the snapshotter knows.
	switch m.Op {
	case workload.Prepare:
		if m.Phase == workload.Ack {
			e.Active[m.Name] = Acked
		} else {
			e.Active[m.Name] = Maybe
		}
	case workload.Commit:
		if m.Phase == workload.Ack {
			e.Committed[m.Name] = Acked
			delete(e.Active, m.Key)
		} else {
			e.Active[m.Key] = Maybe
			if e.Committed[m.Name] != Acked { // one that is there stays, or is replaced in one step
				e.Committed[m.Name] = Maybe
			}
		}
	case workload.Report:
		e.Committed[m.Name] = Acked
	case workload.Verify:
		if m.Phase == workload.Ack {
			e.Verified[m.Name] = Acked
		} else if e.Verified[m.Name] == Gone {
			e.Verified[m.Name] = Maybe
		}
	case workload.Remove:
		set := e.Active
		if _, ok := e.Committed[m.Name]; ok {
			set = e.Committed
		}
		if m.Phase == workload.Ack {
			delete(set, m.Name)
		} else {
			set[m.Name] = Maybe
		}
	}
}

// Promised counts the names that must be there.
func (e Expect) Promised() int {
	n := 0
	for _, s := range e.Committed {
		if s == Acked {
			n++
		}
	}
	return n
}

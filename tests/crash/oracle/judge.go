package oracle

import (
	"fmt"
	"slices"
	"strings"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/workload"
)

// Kind of a finding.
type Kind uint8

// The kinds, see the package documentation.
const (
	Lost Kind = iota + 1
	Lie
	Flaw
)

func (k Kind) String() string { return []string{"", "lost", "lie", "flaw"}[k] }

// Finding is one broken expectation.
type Finding struct {
	Kind   Kind
	Name   string // committed name or active key, empty for the whole store
	Detail string
}

func (f Finding) String() string {
	return strings.TrimSpace(fmt.Sprintf("%s: %s: %s", f.Kind, f.Name, f.Detail))
}

// hidden reports whether a layer has damage that only a comparison of content
// finds, and none had reported it: then a yes about it is no lie.
func (o *Observation) hidden(e Expect, name string) bool {
	return o.Corrupt[name] && e.Verified[name] != Acked
}

// diff is what is not as it was of a committed name, apart from what is hidden.
func (o *Observation) diff(e Expect, name string) string {
	seen := o.Committed[name]
	diff := seen.Diff
	if o.hidden(e, name) {
		diff = ""
	}
	for n, i := name, 0; n != "" && i <= len(o.Committed); n, i = o.Committed[n].Parent, i+1 {
		if o.hidden(e, n) {
			return diff
		}
	}
	return diff + seen.Mounted
}

// Judge compares an observation with what was promised. None is the best
// result.
func Judge(o *Observation, e Expect, plan *workload.Plan) []Finding {
	var out []Finding
	find := func(k Kind, name, format string, args ...any) {
		out = append(out, Finding{k, name, fmt.Sprintf(format, args...)})
	}
	if o.Start != nil {
		kind := Flaw
		if e.Promised() > 0 {
			kind = Lost
		}
		find(kind, "", "it does not start: %v", o.Start)
		return out
	}
	for name, status := range e.Committed {
		seen, there := o.Committed[name]
		switch {
		case status == Maybe && there && seen.Denied != nil && !seen.Due:
			find(Flaw, name, "its commit or its remove was begun: it is there, and not whole: %v", seen.Denied)
		case status != Acked:
		case !there:
			find(Lost, name, "its commit was acknowledged, and it is not there")
		case seen.Due:
		case seen.Denied != nil && seen.Whole:
			find(Lost, name, "a false alarm: it is whole, and was denied: %v", seen.Denied)
		case seen.Denied != nil:
			find(Lost, name, "its commit was acknowledged: %v", seen.Denied)
		case o.diff(e, name) != "":
			find(Lost, name, "its commit was acknowledged, and it is not whole:\n%s", o.diff(e, name))
		}
		if status == Acked && o.Recorded != nil && !o.Recorded[name] {
			find(Flaw, name, "its commit was acknowledged, and its record does not have it: without the database it would be lost")
		}
	}
	for name, seen := range o.Committed {
		switch {
		case e.Committed[name] == Gone:
			find(Lie, name, "reported, and was never committed or is removed")
		case seen.Cleared != "":
			find(Lie, name, "%s", seen.Cleared)
		case seen.Lie != "" && !o.hidden(e, seen.Hopeless):
			find(Lie, name, "%s", seen.Lie)
		case seen.Denied == nil && o.diff(e, name) != "":
			find(Lie, name, "reported, and not whole:\n%s", o.diff(e, name))
		}
		if o.NoBlob[name] {
			find(Lie, name, "it was reported as without a good blob, and its blob is good: its image would be dropped")
		}
		if l := plan.Layer(name); l != nil && l.Parent != seen.Parent {
			find(Lie, name, "its parent is %q, reported is %q", l.Parent, seen.Parent)
		}
		if _, there := o.Committed[seen.Parent]; seen.Parent != "" && !there {
			find(Lie, name, "reported, and its parent %q is not there", seen.Parent)
		}
	}
	for key, status := range e.Active {
		if _, there := o.Active[key]; status == Acked && !there {
			find(Flaw, key, "was prepared and acknowledged, and is not there")
		}
	}
	for key, seen := range o.Active {
		switch {
		case e.Active[key] == Gone:
			find(Flaw, key, "active, and was never prepared or is removed")
		case seen.Lie != "" && !o.hidden(e, seen.Hopeless):
			find(Lie, key, "%s", seen.Lie)
		case seen.Due:
		case seen.Denied != nil:
			find(Flaw, key, "active: %v", seen.Denied)
		case seen.Diff != "":
			find(Flaw, key, "active: %s", seen.Diff)
		}
	}
	for _, text := range o.Flaws {
		find(Flaw, "", "%s", text)
	}
	slices.SortFunc(out, func(a, b Finding) int {
		if a.Kind != b.Kind {
			return int(a.Kind) - int(b.Kind)
		}
		return strings.Compare(a.Name, b.Name)
	})
	return out
}

// Worst returns the most serious kind among the findings, or 0.
func Worst(findings []Finding) Kind {
	worst := Kind(0)
	for _, f := range findings {
		if worst == 0 || rank(f.Kind) > rank(worst) {
			worst = f.Kind
		}
	}
	return worst
}

// rank orders the kinds: a lie is worse than a loss, because nothing heals it.
func rank(k Kind) int { return []int{0, 2, 3, 1}[k] }

// Has reports whether one of the findings is of the kind.
func Has(findings []Finding, k Kind) bool {
	return slices.ContainsFunc(findings, func(f Finding) bool { return f.Kind == k })
}

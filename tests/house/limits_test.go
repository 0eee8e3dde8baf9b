package house

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/house/count"
)

// The limits of every package of the product. Tests are not counted.
const (
	methodsOfType   = "methods of a type"
	linesOfPackage  = "lines of a package"
	linesOfFunction = "lines of a function"
	locksOfPackage  = "locks of a package" // the order of more than that cannot be kept in mind
	arrowsBackUp    = "arrows between files that run back up"
)

var limits = map[string]int{
	methodsOfType:   40,
	linesOfPackage:  2500,
	linesOfFunction: 100,
	locksOfPackage:  4,
	arrowsBackUp:    11, // a third of what package snapshotter had when the redesign began
}

// exceptions are packages that are over a limit, with what they are allowed: what
// they had when this test was written, or less. They may only shrink. One that is
// within the limit again must leave the table.
var exceptions = map[string]map[string]int{}

// TestLimits: go run ./house/cmd/count -v, in tests/, prints what it counts.
func TestLimits(t *testing.T) {
	all, err := count.Load(product, "faults", "./...")
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for _, p := range all {
		name := strings.TrimPrefix(p.Path, module+"/")
		known[name] = true
		typ, methods := p.MostMethods()
		longest := p.Longest()
		for what, c := range map[string]struct {
			have int
			of   string
		}{
			methodsOfType:   {methods, typ},
			linesOfPackage:  {p.Lines, name},
			linesOfFunction: {longest.Lines, longest.Name},
			locksOfPackage:  {len(p.Locks), strings.Join(p.Locks, ", ")},
			arrowsBackUp:    {len(p.Up), "see count -v"},
		} {
			allowed, exception := exceptions[name][what]
			switch {
			case c.have <= limits[what] && exception:
				t.Errorf("%s: %d %s, the limit is %d: it is no exception any more", name, c.have, what, limits[what])
			case c.have > limits[what] && !exception:
				t.Errorf("%s: %d %s (%s), the limit is %d", name, c.have, what, c.of, limits[what])
			case exception && c.have > allowed:
				t.Errorf("%s: %d %s (%s), an exception that may not grow beyond %d", name, c.have, what, c.of, allowed)
			case exception && c.have < allowed:
				t.Logf("%s: %d %s: the exception can be lowered from %d", name, c.have, what, allowed)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(exceptions)) {
		if !known[name] {
			t.Errorf("there is an exception for package %s, and no such package", name)
		}
	}
}

package crash

import (
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/crash/lab"
)

// TestMutants plants defects in durable-snapshotter, one at a time. If one of
// them is not caught, the harness proves nothing.
func TestMutants(t *testing.T) {
	b := theBench(t)
	for _, m := range lab.Mutants() {
		t.Run(m.Name, func(t *testing.T) {
			if !m.Heals {
				t.Parallel()
			}
			c, err := b.Hunt(t.Context(), m, seed)
			if err != nil {
				t.Fatal(err)
			}
			t.Log(c)
			if !c.Caught {
				t.Error("not caught")
			}
		})
	}
}

// TestNoMutant hunts in the same binary with no defect awake: what catches the
// mutants must be their defects.
func TestNoMutant(t *testing.T) {
	b := theBench(t)
	for _, m := range lab.NoMutants() {
		t.Run(m.Mistake, func(t *testing.T) {
			if !m.Heals {
				t.Parallel()
			}
			c, err := b.Hunt(t.Context(), m, seed)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d states", c.States)
			if c.Caught {
				t.Errorf("found without a defect: %s", c.First)
			}
			if c.States == 0 {
				t.Error("nothing was examined")
			}
		})
	}
}

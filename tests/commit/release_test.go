package commit

import (
	"bytes"
	"os"
	"slices"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestReleaseHasNoFaults looks into the binaries: a name that is left in the
// release means that its code is left, too. That the other binary has every
// name shows that the search can find them.
func TestReleaseHasNoFaults(t *testing.T) {
	release := must[[]byte](t)(os.ReadFile(kittest.Binaries(t).Daemon))
	tagged := must[[]byte](t)(os.ReadFile(must[string](t)(faulty())))
	for _, name := range slices.Concat(killPoints(t, "All"), killPoints(t, "Healing"), mutants(t)) {
		// The compiler turns a comparison with a constant of up to eight bytes
		// into instructions, in which no name can be found.
		if len(name) <= 8 {
			t.Logf("%q is too short to be found in any binary", name)
			continue
		}
		if bytes.Contains(release, []byte(name)) {
			t.Errorf("the release binary contains %q", name)
		}
		if !bytes.Contains(tagged, []byte(name)) {
			t.Errorf("the binary with the tag faults lacks %q", name)
		}
	}
	for _, name := range []string{"DURABLE_KILL_AT", "DURABLE_MUTANT"} {
		if bytes.Contains(release, []byte(name)) {
			t.Errorf("the release binary listens to %s", name)
		}
	}
}

package commit

import (
	"bytes"
	"os"
	"slices"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/tests/defects"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestReleaseHasNoFaults searches the binaries for the names of kill points and defects:
// a name that is left in the release means that its code is left, too. Kill points are
// in the binary with the tag faults, and defects in the one with planted defects only.
// That each name is found there shows that the search can find it.
func TestReleaseHasNoFaults(t *testing.T) {
	read := func(binary string) []byte { return must[[]byte](t)(os.ReadFile(binary)) }
	release := read(kittest.Binaries(t).Daemon)
	tagged := read(must[string](t)(faulty()))
	planted := read(must[string](t)(defective()))

	points := append(slices.Concat(killPoints(t, "All"), killPoints(t, "Healing"), killPoints(t, "Applying")), "DURABLE_KILL_AT")
	for _, name := range searchable(t, points) {
		contains(t, name, "release", release, false)
		contains(t, name, "tag faults", tagged, true)
	}
	for _, name := range searchable(t, append(defects.Names(), defects.Env)) {
		contains(t, name, "release", release, false)
		contains(t, name, "tag faults", tagged, false)
		contains(t, name, "defects", planted, true)
	}
}

// contains fails the test unless a binary contains a name, or does not contain it.
func contains(t *testing.T, name, variant string, binary []byte, want bool) {
	t.Helper()
	if bytes.Contains(binary, []byte(name)) != want {
		t.Errorf("binary %q contains %q: %v, want %v", variant, name, !want, want)
	}
}

// searchable returns the names that can be found in a binary: the compiler turns a
// comparison with a constant of up to eight bytes into instructions.
func searchable(t *testing.T, names []string) (long []string) {
	t.Helper()
	for _, name := range names {
		if len(name) <= 8 {
			t.Logf("%q is too short to be found in any binary", name)
			continue
		}
		long = append(long, name)
	}
	return long
}

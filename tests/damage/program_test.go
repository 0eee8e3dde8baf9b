package damage

import (
	"cmp"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
)

// runCheck runs check --json, which must end with the given status.
func runCheck(t *testing.T, d *kit.Daemon, status int, args ...string) []kit.Verdict {
	t.Helper()
	return verdicts(t, d, status, append([]string{"check"}, args...)...)
}

// verdicts runs check or repair with --json, which must end with the given status.
func verdicts(t *testing.T, d *kit.Daemon, status int, args ...string) []kit.Verdict {
	t.Helper()
	results, got, err := d.Verdicts(t.Context(), args...)
	check(t, err)
	if got != status {
		t.Errorf("%q: status %d, want %d: %v", args, got, status, results)
	}
	return results
}

func (n *node) check(t *testing.T, status int, args ...string) []kit.Verdict {
	t.Helper()
	return runCheck(t, n.Daemon, status, args...)
}

// clean fails unless check finds nothing.
func (n *node) clean(t *testing.T, args ...string) {
	t.Helper()
	n.finds(t, nil, args...)
}

// finds fails unless check finds exactly the given differences, by layer, and
// reports of all other layers that they are ready.
func (n *node) finds(t *testing.T, want map[string][]kit.Finding, args ...string) {
	t.Helper()
	status := 0
	if len(want) > 0 {
		status = 1
	}
	results := n.check(t, status, args...)
	if len(results) != len(layerNames) {
		t.Fatalf("check %q has verified %d snapshots, want %d: %+v", args, len(results), len(layerNames), results)
	}
	for i, layer := range layerNames {
		at := slices.IndexFunc(results, func(r kit.Verdict) bool { return r.ChainID == n.image.ChainIDs[i].String() })
		if at < 0 {
			t.Fatalf("no snapshot of layer %s in %+v", layer, results)
		}
		state := "ready"
		if len(want[layer]) > 0 {
			state = "damaged"
		}
		if results[at].State != state {
			t.Errorf("check %q: layer %s is %s, want %s: %+v", args, layer, results[at].State, state, results[at])
		}
		sameFindings(t, layer, want[layer], results[at].Findings)
	}
}

func sameFindings(t *testing.T, layer string, want, have []kit.Finding) {
	t.Helper()
	order := func(a, b kit.Finding) int { return cmp.Or(cmp.Compare(a.Path, b.Path), cmp.Compare(a.What, b.What)) }
	want, have = slices.SortedFunc(slices.Values(want), order), slices.SortedFunc(slices.Values(have), order)
	for _, f := range want {
		if !slices.Contains(have, f) {
			t.Errorf("layer %s: not found: %+v", layer, f)
		}
	}
	for _, f := range have {
		if !slices.Contains(want, f) {
			t.Errorf("layer %s: a false alarm: %+v", layer, f)
		}
	}
}

// waitForDigests is how long it may take until new layers have digests: the
// daemon searches for such layers every 15 seconds.
const waitForDigests = 2 * time.Minute

// waitDigested waits until the daemon has taken content digests of all layers.
func waitDigested(t *testing.T, d *kit.Daemon, layers int) {
	t.Helper()
	waitFor(t, waitForDigests, func() error {
		results := runCheck(t, d, 0, "--cached")
		digested := 0
		for _, r := range results {
			if r.Contents != "" {
				digested++
			}
		}
		if digested != layers {
			return fmt.Errorf("%d of %d layers have content digests, waiting for %d", digested, len(results), layers)
		}
		return nil
	})
}

func (n *node) repair(t *testing.T, status int, args ...string) []kit.Verdict {
	t.Helper()
	return verdicts(t, n.Daemon, status, append([]string{"repair"}, args...)...)
}

package damage

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// result is what check --json prints of a snapshot.
type result struct {
	ID       uint64    `json:"id"`
	Name     string    `json:"name"`
	ChainID  string    `json:"chain_id"`
	State    string    `json:"state"`
	Entries  int64     `json:"entries"`
	Findings []finding `json:"findings"`
	Reason   string    `json:"reason"`
	Contents string    `json:"contents"`
}

// program runs a verb of the binary under test on the daemon's root, with the
// daemon running or not, and returns its exit status.
func program(t *testing.T, d *kit.Daemon, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	argv := []string{args[0], "--config", filepath.Join(filepath.Dir(d.LogPath()), "config.toml"), "--root", d.Root, "--address", d.Address}
	cmd := exec.CommandContext(t.Context(), kittest.Binaries(t).Daemon, append(argv, args[1:]...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return out.String(), errs.String(), exit.ExitCode()
	}
	check(t, err)
	return out.String(), errs.String(), 0
}

// runCheck runs check --json, which must end with the given status.
func runCheck(t *testing.T, d *kit.Daemon, status int, args ...string) []result {
	t.Helper()
	stdout, stderr, got := program(t, d, append([]string{"check", "--json"}, args...)...)
	var results []result
	if err := json.Unmarshal([]byte(stdout), &results); err != nil {
		t.Fatalf("check %q: status %d: %v: %s%s", args, got, err, stdout, stderr)
	}
	if got != status {
		t.Errorf("check %q: status %d, want %d: %s", args, got, status, stderr)
	}
	return results
}

func (n *node) check(t *testing.T, status int, args ...string) []result {
	t.Helper()
	return runCheck(t, n.daemon, status, args...)
}

// clean fails unless check finds nothing.
func (n *node) clean(t *testing.T, args ...string) {
	t.Helper()
	n.finds(t, nil, args...)
}

// finds fails unless check finds exactly the given differences, by layer, and
// says of all other layers that they are ready.
func (n *node) finds(t *testing.T, want map[string][]finding, args ...string) {
	t.Helper()
	status := 0
	if len(want) > 0 {
		status = 1
	}
	results := n.check(t, status, args...)
	if len(results) != len(layerNames) {
		t.Fatalf("check %q has looked at %d snapshots, want %d: %+v", args, len(results), len(layerNames), results)
	}
	for i, layer := range layerNames {
		at := slices.IndexFunc(results, func(r result) bool { return r.ChainID == n.image.ChainIDs[i].String() })
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

func sameFindings(t *testing.T, layer string, want, have []finding) {
	t.Helper()
	order := func(a, b finding) int { return cmp.Or(cmp.Compare(a.Path, b.Path), cmp.Compare(a.What, b.What)) }
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
// daemon looks for such layers every 15 seconds.
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

// report is the part of inspect --json that is looked at here.
type report struct {
	Snapshots []struct {
		ID         uint64
		Kind, Name string
	}
	Journal struct {
		Committed []struct {
			ID       uint64
			ChainID  string `json:"chain_id"`
			Strategy string
		}
		Scrub scrub
	}
}

type scrub struct {
	Depth             string
	Started, Finished time.Time
	Next              uint64
	Looked, Damaged   int
}

func inspect(t *testing.T, d *kit.Daemon) (r report) {
	t.Helper()
	stdout, stderr, status := program(t, d, "inspect", "--json")
	if err := json.Unmarshal([]byte(stdout), &r); err != nil || status != 0 {
		t.Fatalf("inspect: status %d: %v: %s%s", status, err, stdout, stderr)
	}
	return r
}

// repaired is what repair --json prints of a snapshot that is not ready.
type repaired struct {
	result
	Blob   string
	Plan   string
	Healed bool
}

func (n *node) repair(t *testing.T, status int, args ...string) []repaired {
	t.Helper()
	stdout, stderr, got := program(t, n.daemon, append([]string{"repair", "--json"}, args...)...)
	var results []repaired
	if err := json.Unmarshal([]byte(stdout), &results); err != nil {
		t.Fatalf("repair %q: status %d: %v: %s%s", args, got, err, stdout, stderr)
	}
	if got != status {
		t.Errorf("repair %q: status %d, want %d: %s%s", args, got, status, stdout, stderr)
	}
	return results
}

package tests

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// checked is what check --json prints of a snapshot.
type checked struct {
	ID       uint64 `json:"id"`
	Name     string `json:"name"`
	ChainID  string `json:"chain_id"`
	State    string `json:"state"`
	Entries  int64  `json:"entries"`
	Findings []finding
	Reason   string
}

type finding struct{ Path, What, Want, Have string }

// check runs check --json against the daemon, running or not, and returns its
// exit status.
func (s *stack) check(t *testing.T, snapshots ...string) (results []checked, status int) {
	t.Helper()
	stdout, stderr, status := s.run(t, append([]string{"check", "--json"}, snapshots...)...)
	if status == 2 {
		return nil, status
	}
	if err := json.Unmarshal([]byte(stdout), &results); err != nil {
		t.Fatalf("%v: %s%s", err, stdout, stderr)
	}
	return results, status
}

// run runs a verb on the daemon's root.
func (s *stack) run(t *testing.T, args ...string) (stdout, stderr string, status int) {
	t.Helper()
	argv := []string{args[0], "--root", s.daemon.Root, "--address", s.daemon.Address}
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(t.Context(), shared.bins.Daemon, append(argv, args[1:]...)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		status = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	return out.String(), errs.String(), status
}

// TestCheck selects snapshots, prints tables, and tells what is damaged from what
// could not be looked at. All that check can find is in package damage.
func TestCheck(t *testing.T) {
	s := newStack(t, stackOptions{})
	img := image(t, "all-kinds")
	s.pull(t, "transfer", "durable", img)
	all, status := s.check(t)
	if status != 0 || len(all) != len(img.Layers) {
		t.Fatalf("status %d, %d results, want 0 and %d", status, len(all), len(img.Layers))
	}
	at := func(i int) checked {
		t.Helper()
		k := slices.IndexFunc(all, func(r checked) bool { return r.ChainID == img.ChainIDs[i].String() })
		if k < 0 {
			t.Fatalf("no snapshot of layer %d in %+v", i, all)
		}
		return all[k]
	}
	whole, lost := at(0), at(1)

	for _, name := range []string{whole.Name, whole.ChainID, strconv.FormatUint(whole.ID, 10)} {
		if results, status := s.check(t, name); status != 0 || len(results) != 1 || results[0].ID != whole.ID {
			t.Errorf("check %q: status %d, %+v", name, status, results)
		}
	}
	if _, status := s.check(t, whole.ChainID, strconv.Itoa(1<<40)); status != 2 {
		t.Errorf("a snapshot that does not exist: status %d", status)
	}

	if err := s.daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(s.daemon.Root, "snapshots", strconv.FormatUint(lost.ID, 10))); err != nil {
		t.Fatal(err)
	}
	if results, status := s.check(t, whole.ChainID); status != 0 || len(results) != 1 {
		t.Errorf("a layer that is whole beside one that is gone: status %d, %+v", status, results)
	}
	if results, status := s.check(t, lost.ChainID); status != 1 || len(results) != 1 || results[0].State != "damaged" {
		t.Errorf("a layer that is gone: status %d, %+v", status, results)
	}
	table, _, status := s.run(t, "check", whole.ChainID, lost.ChainID)
	for _, want := range []string{
		`(?m)^ID +CHAIN ID +STATE +ENTRIES +SIZE +SEALED +FINDING$`,
		fmt.Sprintf(`(?m)^%d +%s +ready +%d +\S+ +\S+ *$`, whole.ID, whole.ChainID, whole.Entries),
		fmt.Sprintf(`(?m)^%d +%s +damaged +%d +\S+ +\S+ +"\.: missing"$`, lost.ID, lost.ChainID, lost.Entries),
	} {
		if !regexp.MustCompile(want).MatchString(table) {
			t.Errorf("the table has no line %s:\n%s", want, table)
		}
	}
	if lines := strings.Count(table, "\n"); status != 1 || lines != 3 {
		t.Errorf("the table of two layers has %d lines, and the status is %d:\n%s", lines, status, table)
	}

	if err := os.WriteFile(filepath.Join(s.daemon.Root, "metadata.db"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, status := s.check(t); status != 2 {
		t.Errorf("a damaged database: status %d", status)
	}
}

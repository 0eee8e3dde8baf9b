package verbs

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// runCheck runs check --json against the daemon, running or not, and returns its
// exit status.
func runCheck(t *testing.T, s *kit.Node, args ...string) (results []kit.Verdict, status int) {
	t.Helper()
	stdout, stderr, status := kittest.Verb(t, s.Daemon, append([]string{"check", "--json"}, args...)...)
	if status == 2 {
		return nil, status
	}
	if err := json.Unmarshal([]byte(stdout), &results); err != nil {
		t.Fatalf("%v: %s%s", err, stdout, stderr)
	}
	return results, status
}

// TestCheck selects snapshots, prints tables, and distinguishes what is damaged from what
// could not be verified. All that check can find is in package damage.
func TestCheck(t *testing.T) {
	s := kittest.StartNode(t, kit.NodeOptions{})
	img := images.Get(t, "all-kinds")
	kittest.Pull(t, s, "durable", img.Ref)
	all, status := runCheck(t, s)
	if status != 0 || len(all) != len(img.Layers) {
		t.Fatalf("status %d, %d results, want 0 and %d", status, len(all), len(img.Layers))
	}
	at := func(i int) kit.Verdict {
		t.Helper()
		k := slices.IndexFunc(all, func(r kit.Verdict) bool { return r.ChainID == img.ChainIDs[i].String() })
		if k < 0 {
			t.Fatalf("no snapshot of layer %d in %+v", i, all)
		}
		return all[k]
	}
	whole, lost := at(0), at(1)

	for _, name := range []string{whole.Name, whole.ChainID, strconv.FormatUint(whole.ID, 10)} {
		if results, status := runCheck(t, s, name); status != 0 || len(results) != 1 || results[0].ID != whole.ID {
			t.Errorf("check %q: status %d, %+v", name, status, results)
		}
	}
	if _, status := runCheck(t, s, whole.ChainID, strconv.Itoa(1<<40)); status != 2 {
		t.Errorf("a snapshot that does not exist: status %d", status)
	}

	if err := s.Daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(s.Daemon.Root, "snapshots", strconv.FormatUint(lost.ID, 10))); err != nil {
		t.Fatal(err)
	}
	if results, status := runCheck(t, s, whole.ChainID); status != 0 || len(results) != 1 {
		t.Errorf("a layer that is whole beside one that is gone: status %d, %+v", status, results)
	}
	if results, status := runCheck(t, s, lost.ChainID); status != 1 || len(results) != 1 || results[0].State != "damaged" {
		t.Errorf("a layer that is gone: status %d, %+v", status, results)
	}
	table, _, status := kittest.Verb(t, s.Daemon, "check", whole.ChainID, lost.ChainID)
	for _, want := range []string{
		`(?m)^ID +CHAIN ID +STATE +ENTRIES +SIZE +SEALED +BLOB +FINDING$`,
		fmt.Sprintf(`(?m)^%d +%s +ready +%d +\S+ +\S+ +unknown *$`, whole.ID, whole.ChainID, whole.Entries),
		fmt.Sprintf(`(?m)^%d +%s +damaged +%d +\S+ +\S+ +unknown +"\.: missing"$`, lost.ID, lost.ChainID, lost.Entries),
	} {
		if !regexp.MustCompile(want).MatchString(table) {
			t.Errorf("the table has no line %s:\n%s", want, table)
		}
	}
	if lines := strings.Count(table, "\n"); status != 1 || lines != 3 {
		t.Errorf("the table of two layers has %d lines, and the status is %d:\n%s", lines, status, table)
	}

	if err := os.WriteFile(filepath.Join(s.Daemon.Root, "metadata.db"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, status := runCheck(t, s); status != 2 {
		t.Errorf("a damaged database: status %d", status)
	}
}

// TestCheckShowsMissingBlobs: a layer without a blob cannot be healed, and check shows
// it while the layer is whole. Where there is no content store, that is not known.
func TestCheckShowsMissingBlobs(t *testing.T) {
	s := kittest.StartNode(t, kit.NodeOptions{})
	img := images.Get(t, "all-kinds")
	kittest.Pull(t, s, "durable", img.Ref)
	config := filepath.Join(t.TempDir(), "config.toml")
	store := s.ContentRoot()
	if err := os.WriteFile(config, fmt.Appendf(nil, "content_root = '%s'\n", store), 0o600); err != nil {
		t.Fatal(err)
	}
	check := func(lacking int) []kit.Verdict {
		t.Helper()
		for _, flag := range []string{"--cached", "--deep"} {
			table, stderr, status := kittest.Verb(t, s.Daemon, "check", "--config", config, flag)
			if have := strings.Count(table, "  no  "); status != 0 || have != lacking {
				t.Errorf("check %s: status %d, %d layers have no blob, want 0 and %d:\n%s%s", flag, status, have, lacking, table, stderr)
			}
			if want := fmt.Sprintf("%d layers have no blob", lacking); strings.Contains(stderr, want) != (lacking > 0) {
				t.Errorf("check %s: %s", flag, stderr)
			}
		}
		all, _ := runCheck(t, s, "--config", config)
		return all
	}
	for _, r := range check(0) {
		if r.Blob == "" || r.Lacking {
			t.Errorf("with all blobs: %+v", r)
		}
	}
	lost := img.Layers[1].Digest
	if err := os.Remove(filepath.Join(store, "blobs", lost.Algorithm().String(), lost.Encoded())); err != nil {
		t.Fatal(err)
	}
	for _, r := range check(1) {
		if want := r.ChainID == img.ChainIDs[1].String(); r.Lacking != want || (r.NoBlob != "") != want {
			t.Errorf("without the blob %s: %+v", lost, r)
		}
	}
	if err := os.RemoveAll(store); err != nil {
		t.Fatal(err)
	}
	for _, r := range check(0) {
		if r.Blob != "" || r.NoBlob == "" {
			t.Errorf("without a content store: %+v", r)
		}
	}
}

// TestNotComparable: a layer that a builder has just made has neither content
// digests nor a blob. That is nothing bad, and is distinguished from what could not be
// verified, and from damage, by the state and by the exit status.
func TestNotComparable(t *testing.T) {
	s := kittest.StartNode(t, kit.NodeOptions{})
	img := images.Get(t, "all-kinds")
	kittest.Pull(t, s, "durable", img.Ref)
	kittest.Ctr(t, s, "snapshot", "--snapshotter", "durable", "prepare", "work", "")
	kittest.Ctr(t, s, "snapshot", "--snapshotter", "durable", "commit", "built", "work")
	// At once: content digests come soon.
	stdout, stderr, status := kittest.Verb(t, s.Daemon, "check", "--deep", "--json")
	var results []kit.Verdict
	if err := json.Unmarshal([]byte(stdout), &results); err != nil {
		t.Fatalf("%v: %s%s", err, stdout, stderr)
	}
	built := slices.IndexFunc(results, func(r kit.Verdict) bool { return strings.HasSuffix(r.Name, "/built") })
	if built < 0 || status != 0 {
		t.Fatalf("status %d, want 0: %s%s", status, stdout, stderr)
	}
	if r := results[built]; r.State != "not comparable" && r.State != "ready" {
		t.Errorf("%+v", r)
	}

	// A mount inside of a layer: nothing is known of it.
	dir := filepath.Join(s.Daemon.Root, "snapshots", strconv.FormatUint(results[built].ID, 10), "fs")
	if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	_, stderr, status = kittest.Verb(t, s.Daemon, "check")
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if status != 3 || !strings.Contains(stderr, "could not be verified") {
		t.Errorf("with a mount in it: status %d, want 3: %s", status, stderr)
	}
	if err := os.Remove(filepath.Join(dir, "..", "seal")); err != nil {
		t.Fatal(err)
	}
	if _, stderr, status = kittest.Verb(t, s.Daemon, "check"); status != 1 || !strings.Contains(stderr, "damaged") {
		t.Errorf("without its seal: status %d, want 1: %s", status, stderr)
	}
}

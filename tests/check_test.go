package tests

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
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
	args := append([]string{"check", "--json", "--root", s.daemon.Root, "--address", s.daemon.Address}, snapshots...)
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), shared.bins.Daemon, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		status = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	if status == 2 {
		return nil, status
	}
	if err := json.Unmarshal(stdout.Bytes(), &results); err != nil {
		t.Fatalf("%v: %s%s", err, &stdout, &stderr)
	}
	return results, status
}

// TestCheck damages layers of an image in use, one way at a time. Each is found
// and named, with the daemon running and stopped, and nothing is found when
// nothing is wrong.
func TestCheck(t *testing.T) {
	s := newStack(t, stackOptions{})
	img := image(t, "all-kinds")
	s.pull(t, "transfer", "durable", img)
	run := image(t, "runnable")
	s.pull(t, "transfer", "durable", run)
	s.runDetached(t, run.Ref, "inuse")

	healthy := func() {
		t.Helper()
		results, status := s.check(t)
		if want := len(img.Layers) + len(run.Layers); status != 0 || len(results) != want {
			t.Fatalf("status %d, %d results, want 0 and %d", status, len(results), want)
		}
		for _, r := range results {
			if r.State != "ready" || len(r.Findings) > 0 {
				t.Fatalf("a false alarm: %+v", r)
			}
		}
	}
	healthy()

	base := s.layer(t, img.ChainIDs[0].String())
	saved := filepath.Join(filepath.Dir(base), "saved")
	for _, c := range damages(t, base) {
		t.Run(c.name, func(t *testing.T) {
			if out, err := exec.Command("cp", "-a", base, saved).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			before := treeOf(t, base)
			if err := c.damage(); err != nil {
				t.Fatal(err)
			}
			damaged := treeOf(t, base)
			results, status := s.check(t)
			if status != 1 {
				t.Errorf("status %d", status)
			}
			for _, r := range results {
				if r.ChainID != img.ChainIDs[0].String() {
					if r.State != "ready" {
						t.Errorf("a false alarm: %+v", r)
					}
					continue
				}
				// The directory of a name that came or went has another time, too.
				named := slices.ContainsFunc(r.Findings, func(f finding) bool { return f.Path == c.path })
				if r.State != "damaged" || !named {
					t.Errorf("%+v, want a finding at %q", r, c.path)
				}
			}
			if d := kit.Diff(damaged, treeOf(t, base), 5); d != "" {
				t.Errorf("check has written:\n%s", d)
			}
			// Back to what it was: a copy keeps everything but the order of
			// directories, and its seal still holds.
			if err := errors.Join(os.RemoveAll(base), os.Rename(saved, base)); err != nil {
				t.Fatal(err)
			}
			if d := kit.Diff(before, treeOf(t, base), 5); d != "" {
				t.Fatalf("not restored:\n%s", d)
			}
		})
	}
	healthy()

	if _, status := s.check(t, img.ChainIDs[0].String(), strconv.Itoa(1<<40)); status != 2 {
		t.Errorf("a snapshot that does not exist: status %d", status)
	}
	if results, status := s.check(t, run.ChainIDs[0].String()); status != 0 || len(results) != 1 {
		t.Errorf("one snapshot: status %d, %+v", status, results)
	}
	seal := filepath.Join(filepath.Dir(base), "seal")
	if err := os.Rename(seal, seal+".away"); err != nil {
		t.Fatal(err)
	}
	if results, status := s.check(t, img.ChainIDs[0].String()); status != 1 || results[0].State != "damaged" || !strings.Contains(results[0].Reason, "no valid seal") {
		t.Errorf("without a seal: status %d, %+v", status, results)
	}
	if err := os.Rename(seal+".away", seal); err != nil {
		t.Fatal(err)
	}

	s.wantRunning(t, "inuse")
	if err := s.daemon.Stop(); err != nil {
		t.Fatal(err)
	}
	healthy()
	if err := os.RemoveAll(filepath.Dir(s.layer(t, img.ChainIDs[1].String()))); err != nil {
		t.Fatal(err)
	}
	if results, status := s.check(t, img.ChainIDs[1].String()); status != 1 || results[0].State != "damaged" {
		t.Errorf("a layer that is gone, daemon stopped: status %d, %+v", status, results)
	}
	if err := os.WriteFile(filepath.Join(s.daemon.Root, "metadata.db"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, status := s.check(t); status != 2 {
		t.Errorf("a damaged database: status %d", status)
	}
}

// layer is the directory of a committed chain ID.
func (s *stack) layer(t *testing.T, chainID string) string {
	t.Helper()
	results, status := s.check(t, chainID)
	if status == 2 || len(results) != 1 {
		t.Fatalf("no layer %s: status %d, %+v", chainID, status, results)
	}
	return filepath.Join(s.daemon.Root, "snapshots", strconv.FormatUint(results[0].ID, 10), "fs")
}

func treeOf(t *testing.T, dir string) kit.Tree {
	t.Helper()
	tree, err := kit.Fingerprint(dir)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// damage is one way to lose something of a layer.
type damage struct {
	name, path string
	damage     func() error
}

// damages finds a victim for each kind of damage in the layer.
func damages(t *testing.T, base string) []damage {
	t.Helper()
	tree := treeOf(t, base)
	find := func(what string, ok func(name string, n kit.Node) bool) string {
		for _, name := range slices.Sorted(maps.Keys(tree)) {
			if ok(name, tree[name]) {
				return name
			}
		}
		t.Fatalf("the image has no %s", what)
		return ""
	}
	at := func(rel string) string { return filepath.Join(base, rel) }
	// Time is put back, so that what is changed shows by itself.
	quietly := func(rel string, change func(path string) error) func() error {
		return func() error {
			var st unix.Stat_t
			if err := unix.Lstat(at(rel), &st); err != nil {
				return err
			}
			return errors.Join(change(at(rel)), unix.UtimesNanoAt(unix.AT_FDCWD, at(rel), []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW))
		}
	}
	regular := find("file", func(_ string, n kit.Node) bool { return n.Mode.IsRegular() && n.Size > 10 && n.Nlink == 1 })
	hard := find("hardlink", func(_ string, n kit.Node) bool { return n.Mode.IsRegular() && n.Nlink > 1 })
	link := find("symlink", func(_ string, n kit.Node) bool { return n.Mode&os.ModeSymlink != 0 })
	setuid := find("setuid file", func(_ string, n kit.Node) bool { return n.Mode&os.ModeSetuid != 0 })
	capable := find("file with a capability", func(_ string, n kit.Node) bool { return strings.Contains(n.Xattrs, "security.capability") })
	dir := find("directory", func(name string, n kit.Node) bool { return n.Mode.IsDir() && name != "." })
	return []damage{
		{"file removed", regular, func() error { return os.Remove(at(regular)) }},
		{"file emptied", regular, quietly(regular, func(p string) error { return os.Truncate(p, 0) })},
		{"file shortened", regular, quietly(regular, func(p string) error { return os.Truncate(p, 5) })},
		{"file grown", regular, quietly(regular, func(p string) error { return os.Truncate(p, 1<<20) })},
		{"mode", regular, quietly(regular, func(p string) error { return os.Chmod(p, 0o111) })},
		{"owner", regular, quietly(regular, func(p string) error { return os.Lchown(p, 54321, 54321) })},
		{"setuid bit", setuid, quietly(setuid, func(p string) error { return unix.Chmod(p, 0o755) })},
		{"capability", capable, quietly(capable, func(p string) error { return unix.Removexattr(p, "security.capability") })},
		{"opaque mark added", dir, quietly(dir, func(p string) error { return unix.Setxattr(p, "trusted.overlay.opaque", []byte("y"), 0) })},
		{"time", regular, func() error { return os.Chtimes(at(regular), time.Time{}, time.Unix(5, 0)) }},
		{"symlink retargeted", link, quietly(link, func(p string) error { return errors.Join(os.Remove(p), os.Symlink("elsewhere", p)) })},
		{"hardlink broken", hard, quietly(hard, func(p string) error { return unlink(p) })},
		{"replaced by a directory", regular, func() error { return errors.Join(os.Remove(at(regular)), os.Mkdir(at(regular), 0o755)) }},
	}
}

// unlink makes a name of a file a file of its own.
func unlink(path string) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	st, err := os.Lstat(path)
	if err != nil {
		return err
	}
	return errors.Join(os.Remove(path), os.WriteFile(path, content, st.Mode().Perm()))
}

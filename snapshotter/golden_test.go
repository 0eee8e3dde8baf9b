package snapshotter

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/durable-snapshotter/durable-snapshotter/internal/layers"
	"github.com/durable-snapshotter/durable-snapshotter/internal/layout"
	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
	"github.com/durable-snapshotter/durable-snapshotter/internal/verify"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// goldenRoot unpacks a root that a program of an earlier revision has written. Those files
// are kept for ever: a root that looks like one of them must stay usable.
func goldenRoot(t *testing.T, name string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("owners, devices and trusted attributes need root")
	}
	root := t.TempDir()
	out, err := exec.Command("tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpzf", filepath.Join("testdata", name+".tar.gz"), "-C", root).CombinedOutput()
	if err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	return root
}

// TestGoldenRoots opens the root of every earlier revision, verifies its layers, finds damage
// of them, and goes on with it.
func TestGoldenRoots(t *testing.T) {
	for name, c := range map[string]struct {
		layers int
		state  storage.State // of a layer, after a verification of its content
		depth  storage.Depth
		reason string
	}{
		"built-in": {1, storage.StateUnverified, "", "never sealed"},
		// The journal has a digest, and does not show that there never was a seal.
		"journal-1-unsealed":   {2, storage.StateDamaged, storage.DepthMetadata, "no valid seal"},
		"journal-1":            {2, verify.NotComparable, storage.DepthMetadata, "digests: no valid seal: none were taken"},
		"journal-2":            {2, storage.StateReady, storage.DepthContent, ""},
		"journal-3":            {2, storage.StateReady, storage.DepthContent, ""},
		"journal-3-2026-11-30": {2, storage.StateReady, storage.DepthContent, ""},
	} {
		t.Run(name, func(t *testing.T) {
			root := goldenRoot(t, name)
			s := start(t, root)
			known := layersOf(t, s)
			if len(known) != c.layers {
				t.Errorf("%d layers, want %d", len(known), c.layers)
			}
			for _, l := range known {
				r := verifyDeep(t, s, l)
				if r.State != c.state || r.Depth != c.depth || !strings.Contains(r.Reason, c.reason) {
					t.Errorf("%s: %+v", l.Name, r)
				}
				info, err := s.Stat(t.Context(), l.Name)
				if refused := errors.As(err, new(*layers.DamagedError)); refused != (c.state == storage.StateDamaged) || !refused && (err != nil || info.Kind != snapshots.KindCommitted) {
					t.Errorf("%s: %+v, %v", l.Name, info, err)
				}
			}
			j := journalOf(t, s)
			if name != "built-in" && (len(j.Open) != 1 || j.Open[0].Key != "default/3/container" || len(j.History) != 1 || j.History[0].Name != "default/5/removed too") {
				t.Errorf("journal %+v", j)
			}
			if c.state == storage.StateDamaged {
				return
			}
			addLayer(t, s, "added", known[len(known)-1].Name)
			treetest.Check(t, s.Remove(t.Context(), "added"))
			stop(t, s)

			s = start(t, root)
			if known = layersOf(t, s); len(known) != c.layers || known[0].State == storage.StateDamaged {
				t.Errorf("after a restart: %+v", known)
			}
			file := filepath.Join(s.root.Tree(known[0].ID), "dir", "file")
			switch c.depth {
			case storage.DepthContent:
				treetest.Check(t, treetest.FlipIn(file, 0))
			case storage.DepthMetadata:
				treetest.Check(t, os.Truncate(file, 0))
			default:
				return
			}
			if r := verifyDeep(t, s, known[0]); r.State != storage.StateDamaged || len(r.Findings) < 2 { // it has two names
				t.Errorf("damaged: %+v", r)
			}
		})
	}
}

// layersOf are the committed layers, in the order of their numbers.
func layersOf(t *testing.T, s *Snapshotter) []verify.Result {
	t.Helper()
	r, err := s.Inspect(t.Context())
	treetest.Check(t, err)
	return r.Layers
}

func verifyDeep(t *testing.T, s *Snapshotter, l verify.Result) verify.Result {
	t.Helper()
	for _, e := range journalOf(t, s).Committed {
		if e.ID == l.ID {
			r, err := verify.Layer(t.Context(), s.root.Path, e, verify.Options{Deep: true, Contents: l.Contents, Blobs: s.blobs})
			treetest.Check(t, err)
			return r
		}
	}
	t.Fatalf("layer %d is not in the journal", l.ID)
	return verify.Result{}
}

// TestGoldenNewer: a root that a newer version has written is refused, and not one byte of its
// database changes.
func TestGoldenNewer(t *testing.T) {
	root := goldenRoot(t, "newer")
	file := filepath.Join(root, storage.FileName)
	before, err := os.ReadFile(file)
	treetest.Check(t, err)
	_, err = New(t.Context(), Config{Root: root})
	if want := "journal version 4: written by a newer version of durable-snapshotter"; !errors.Is(err, layout.ErrNewer) || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want %s", err, want)
	}
	if after, err := os.ReadFile(file); err != nil || string(after) != string(before) {
		t.Errorf("the database has changed, or %v", err)
	}
}

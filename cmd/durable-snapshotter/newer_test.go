package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/durable-snapshotter/durable-snapshotter/internal/treetest"
	"github.com/durable-snapshotter/durable-snapshotter/storage"
)

// TestNewerRoot: after a downgrade, each verb that reads the root names what is the matter and
// the cure, and leaves the database alone.
func TestNewerRoot(t *testing.T) {
	root := t.TempDir()
	if out, err := exec.Command("tar", "-xzf", "../../snapshotter/testdata/newer.tar.gz", "-C", root, "./"+storage.FileName, "./snapshots/2/record").CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	file := filepath.Join(root, storage.FileName)
	before, err := os.ReadFile(file)
	treetest.Check(t, err)
	config := filepath.Join(t.TempDir(), "config.toml")
	treetest.Check(t, os.WriteFile(config, []byte("[containerd]\naddress = ''\n"), 0o600))
	for _, verb := range []string{"serve", "check", "repair", "repair --apply", "repair --rebuild", "inspect"} {
		args := append(strings.Fields(verb), "--config", config, "--root", root, "--address", filepath.Join(root, "s.sock"))
		var out, errs bytes.Buffer
		status := run(t.Context(), args, &out, &errs)
		for _, want := range []string{"written by a newer version of durable-snapshotter", "the data is intact; run the version that wrote it, or a newer one"} {
			if status == 0 || !strings.Contains(errs.String(), want) {
				t.Errorf("%s: exit status %d, want words %q:\n%s", verb, status, want, errs.String())
			}
		}
	}
	if after, err := os.ReadFile(file); err != nil || !bytes.Equal(after, before) {
		t.Errorf("the database has changed, or %v", err)
	}
}

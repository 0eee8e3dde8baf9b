package tests

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/durable-snapshotter/durable-snapshotter/tests/kit"
	"github.com/durable-snapshotter/durable-snapshotter/tests/kit/kittest"
)

// TestReadmeConfiguration starts containerd with the text that the README tells
// users to write, apart from the paths, and pulls with it.
func TestReadmeConfiguration(t *testing.T) {
	blocks := readmeTOML(t)
	debian, err := kit.DebianContainerd(t.Context(), shortDir(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		text string
		bins kit.Binaries
	}{
		{"version 2, containerd 1.6", blocks["version = 2"], debian},
		{"version 3", blocks["version = 3"], shared.bins},
		{"version 4", strings.Replace(blocks["version = 3"], "version = 3", "version = 4", 1), shared.bins},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := newDisk(t, kit.DiskOptions{})
			d := startDaemon(t, kit.DaemonOptions{Dir: disk.Path("durable"), RunDir: shortDir(t)})
			text := strings.ReplaceAll(c.text, "/run/durable-snapshotter/durable-snapshotter.sock", d.Address)
			text = strings.ReplaceAll(text, "/var/lib/durable-snapshotter", d.Root)
			pullWith(t, c.bins, text, disk.Path("containerd"))
		})
	}
}

// readmeTOML returns the README's TOML blocks by their first line.
func readmeTOML(t *testing.T) map[string]string {
	t.Helper()
	b, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := map[string]string{}
	parts := strings.Split(string(b), "```toml\n")
	for _, p := range parts[1:] {
		text, _, _ := strings.Cut(p, "```")
		first, _, _ := strings.Cut(text, "\n")
		blocks[first] = text
	}
	if blocks["version = 2"] == "" || blocks["version = 3"] == "" {
		t.Fatalf("the README lacks a configuration: %q", blocks)
	}
	return blocks
}

func pullWith(t *testing.T, bins kit.Binaries, config, root string) {
	t.Helper()
	run := shortDir(t)
	file := filepath.Join(run, "config.toml")
	// Not a user's business: keeps the plugin off the machine's /opt.
	config += fmt.Sprintf("[plugins.'io.containerd.internal.v1.opt']\n  path = %q\n", filepath.Join(run, "opt"))
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(run, "c.sock")
	p, err := kit.StartProcess("containerd", filepath.Join(run, "log"), nil,
		bins.Containerd, "--config", file, "--address", socket, "--root", root, "--state", filepath.Join(run, "state"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kittest.Stop(t, p) })
	ctr := func(ctx context.Context, args ...string) (string, error) {
		out, err := exec.CommandContext(ctx, bins.Ctr, append([]string{"--address", socket}, args...)...).CombinedOutput()
		return string(out), err
	}
	if err := p.WaitReady(t.Context(), time.Minute, func(ctx context.Context) error {
		_, err := ctr(ctx, "version")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	plugins, err := ctr(t.Context(), "plugins", "ls")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"durable", "cri"} {
		if !pluginOK(plugins, want) {
			t.Errorf("plugin %s is not ok:\n%s", want, plugins)
		}
	}
	img := image(t, "runnable")
	ref := img.Ref
	if out, err := ctr(t.Context(), "image", "pull", "--plain-http", "--snapshotter", "durable", ref); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	out, err := ctr(t.Context(), "snapshots", "--snapshotter", "durable", "ls")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out, img.Top()) {
		t.Errorf("the top layer %s is not there:\n%s", img.Top(), out)
	}
}

// pluginOK finds a line of ctr plugins ls: type, id, platforms, status.
func pluginOK(table, id string) bool {
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) >= 3 && f[1] == id && f[len(f)-1] == "ok" {
			return true
		}
	}
	return false
}

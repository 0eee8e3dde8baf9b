package deploy

import (
	"encoding/json"
	"errors"
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

// plugin runs the plugin as node-problem-detector does, and returns its line and its
// exit status.
func plugin(t *testing.T, d *kit.Daemon, config string, args ...string) (line string, status int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(deployed, "node-problem-detector/durable-snapshotter.sh"), args...)
	cmd.Env = append(os.Environ(), "DURABLE_SNAPSHOTTER="+kittest.Binaries(t).Daemon, "DURABLE_CONFIG="+config)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out)), cmd.ProcessState.ExitCode()
}

// TestPlugin: the plugin reports a healthy node, one with damaged layers, and one
// whose daemon does not run.
func TestPlugin(t *testing.T) {
	disk := kittest.NewDisk(t, kit.DiskOptions{})
	d := kittest.StartDaemon(t, kit.DaemonOptions{Dir: disk.Path("durable")})
	config := filepath.Join(t.TempDir(), "config.toml")
	check(t, os.WriteFile(config, fmt.Appendf(nil, "root = '%s'\naddress = '%s'\ncontent_root = ''\n", d.Root, d.Address), 0o600))
	for _, name := range []string{"a", "b", "c"} {
		kittest.MakeLayer(t, d, name)
	}
	want := func(verb, line string, status int) {
		t.Helper()
		if got, s := plugin(t, d, config, verb); s != status || !strings.HasPrefix(got, line) {
			t.Errorf("%s: status %d, want %d: %q, want %q", verb, s, status, got, line)
		}
	}
	want("layers", "all layers are ready", 0)
	want("daemon", "durable-snapshotter serves", 0)

	// The power goes, and the file of one layer is another one when it is back.
	check(t, d.Kill())
	check(t, kit.NewBoot())
	layer := kittest.Inspect(t, d).Layers[0]
	check(t, os.Truncate(filepath.Join(d.LayerDir(layer.ID), "file"), 100))
	want("daemon", "no pod can start", 1)
	check(t, d.Start(t.Context()))
	kittest.WaitFor(t, time.Minute, func() error {
		if line, status := plugin(t, d, config, "layers"); status != 1 || !strings.HasPrefix(line, "1 layers are damaged, 0 are being healed") {
			return fmt.Errorf("status %d: %s", status, line)
		}
		return nil
	})
	want("", "usage", 2)
}

// TestPluginConfiguration: each rule is of a condition, and calls the plugin with an
// argument that it knows.
func TestPluginConfiguration(t *testing.T) {
	var c struct {
		Plugin     string
		Source     string
		Conditions []struct{ Type, Reason, Message string }
		Rules      []struct {
			Type, Condition, Reason, Path, Timeout string
			Args                                   []string
		}
	}
	check(t, json.Unmarshal([]byte(read(t, "node-problem-detector/durable-snapshotter-monitor.json")), &c))
	if c.Plugin != "custom" || c.Source == "" || len(c.Rules) != 2 {
		t.Errorf("%+v", c)
	}
	script, doc := read(t, "node-problem-detector/durable-snapshotter.sh"), read(t, "node-problem-detector/README.md")
	for i, r := range c.Rules {
		if r.Type != "permanent" || len(c.Conditions) <= i || c.Conditions[i].Type != r.Condition {
			t.Errorf("rule %+v is of no condition", r)
			continue
		}
		if len(r.Args) != 1 || !strings.Contains(script, "\n"+r.Args[0]+")\n") || !strings.HasSuffix(r.Path, "/durable-snapshotter.sh") {
			t.Errorf("rule %+v does not call the plugin", r)
		}
		// node-problem-detector sets the message of a condition that is not met.
		if !strings.Contains(script, `"`+c.Conditions[i].Message+`"`) {
			t.Errorf("the plugin does not print %q", c.Conditions[i].Message)
		}
		if !strings.Contains(doc, fmt.Sprintf("| `%s` |", r.Condition)) || !strings.Contains(doc, fmt.Sprintf("| `%s` |", r.Reason)) {
			t.Errorf("README.md has no row of %s, %s", r.Condition, r.Reason)
		}
	}
}
